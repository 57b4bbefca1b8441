"""Which units to keep under a budget: pure functions on arrays."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.compression.units import Pooling, Units, pool
from narrows.errors import BudgetError, ConfigError, NumericalError

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


def stage_targets(free: int, budget: int, stages: int) -> list[int]:
    """Tokens left after each stage when ``free`` tokens shrink to ``budget`` by equal ratios.

    Stages that would delete nothing are left out, so the list strictly falls, may be shorter
    than ``stages``, ends with ``budget`` exactly, and is empty when nothing need be deleted.
    Raises ConfigError if ``stages`` < 1 or ``budget`` < 0.
    """
    if stages < 1:
        raise ConfigError(f"stages must be at least 1, not {stages}")
    if budget < 0:
        raise ConfigError(f"a budget cannot be negative ({budget})")
    targets: list[int] = []
    if free <= budget:
        return targets
    left = free
    for stage in range(1, stages + 1):
        target = budget if stage == stages else round(free * (budget / free) ** (stage / stages))
        if target < left:
            targets.append(target)
            left = target
    return targets


def fill(scores: Floats, costs: NDArray[np.int64], budget: int) -> Mask:
    """Keep units by falling score (ties: earlier first); one that does not fit is skipped.

    The cost kept is at most ``budget`` and, if not all fit, more than ``budget`` less the
    largest cost; with unit costs it is ``budget`` exactly. Raises NumericalError for NaN scores.
    """
    scores = _checked(scores)
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(scores), dtype=bool)
    if (costs == 1).all():
        kept[order[: max(budget, 0)]] = True
        return kept
    left = budget
    for unit in order.tolist():
        cost = int(costs[unit])
        if cost <= left:
            kept[unit] = True
            left -= cost
    return kept


class Shares:
    """A budget of tokens spent segment after segment, each given its share of the candidates.

    Args:
        costs: tokens of every unit.
        candidates: units that may be chosen; the shares count these.
        budget: tokens to spend in all.
    """

    def __init__(self, costs: NDArray[np.int64], candidates: Mask, budget: int) -> None:
        self.costs, self.candidates, self.budget = costs, candidates, budget
        self.total = int(costs[candidates].sum())
        self.seen = self.spent = 0

    def pick(
        self, segment: NDArray[np.int64], token_scores: Floats, how: Pooling = "mean"
    ) -> NDArray[np.int64]:
        """The units chosen of ``segment``, unit indices whose tokens have ``token_scores``. What
        rounding left over of earlier shares is spent here."""
        costs, open_ = self.costs[segment], self.candidates[segment]
        self.seen += int(costs[open_].sum())
        share = self.budget * self.seen // max(self.total, 1) - self.spent
        worth = pool(Units(np.append(0, np.cumsum(costs))), token_scores, how)
        chosen = segment[open_][fill(worth[open_], costs[open_], share)]
        self.spent += int(self.costs[chosen].sum())
        return chosen


def max_apart(deletable: Mask) -> int:
    """The most units ``delete_apart`` can delete: half of each deletable run, rounded up."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], deletable, [False])).astype(np.int8)))
    return int(((edges[1::2] - edges[::2] + 1) // 2).sum())


def delete_apart(scores: Floats, deletable: Mask, count: int) -> Mask:
    """Delete exactly ``count`` deletable units, no two adjacent, of least total score.

    Returns the mask of deleted units. The least total is convex in ``count``, so deletions can
    be added one at a time if each may revise earlier ones: the cheapest unit goes and is merged
    with its two neighbours into one that stands for the reverse trade, both neighbours in its
    place. Exact, O(n log n). Raises BudgetError if ``count`` exceeds ``max_apart(deletable)``,
    NumericalError for NaN scores.
    """
    most = max_apart(deletable)
    if not 0 <= count <= most:
        raise BudgetError(f"cannot delete {count} units with no two adjacent (at most {most})")
    trades = _Trades(np.where(deletable, _checked(scores), np.inf))
    for _ in range(count):
        trades.take_cheapest()
    return trades.taken()


class _Trades:
    """Runs of odd length, in line. Within a run every second position is taken, from the second
    on; taking the run takes the others instead, one more, at the price ``cost``.

    Positions 0 and n + 1 are walls: they cost infinity, and so does every trade that needs them.
    """

    def __init__(self, scores: Floats) -> None:
        n = len(scores)
        self.size = n
        self.cost: list[float] = [np.inf, *scores.tolist(), np.inf]
        self.first = list(range(n + 2))  # a run is known by one of its positions
        self.last = list(range(n + 2))
        self.left = [i - 1 for i in range(n + 2)]
        self.right = [i + 1 for i in range(n + 2)]
        self.alive = [True] * (n + 2)
        self.heap = [(cost, i) for i, cost in enumerate(self.cost) if cost < np.inf]
        heapq.heapify(self.heap)

    def take_cheapest(self) -> None:
        while True:
            cost, run = heapq.heappop(self.heap)
            if self.alive[run]:
                break
        left, right = self.left[run], self.right[run]
        self.cost[run] = self.cost[left] + self.cost[right] - cost
        self.first[run], self.last[run] = self.first[left], self.last[right]
        self.alive[left] = self.alive[right] = False
        self.left[run], self.right[run] = self.left[left], self.right[right]
        if self.left[run] >= 0:
            self.right[self.left[run]] = run
        if self.right[run] < self.size + 2:
            self.left[self.right[run]] = run
        if self.cost[run] < np.inf:
            heapq.heappush(self.heap, (self.cost[run], run))

    def taken(self) -> Mask:
        mask = np.zeros(self.size + 2, dtype=bool)
        for run, alive in enumerate(self.alive):
            if alive:
                mask[self.first[run] + 1 : self.last[run] : 2] = True
        return mask[1:-1]


def _checked(scores: Any) -> Floats:
    checked: Floats = np.asarray(scores, dtype=np.float64)
    if np.isnan(checked).any():
        raise NumericalError(f"{int(np.isnan(checked).sum())} of {len(checked)} scores are NaN")
    return checked

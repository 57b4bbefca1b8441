"""One stage of deletion: which of the units still there stay, by three policies.

All take the units' ``scores`` and ``costs`` (tokens) ``[units]``, which of them are ``free`` to
go, and ``budget``, the most tokens of free units to keep. All return the bool mask of free units
kept and miss the budget by less than the cost of one unit (``keep_apart`` where it can).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from narrows.compression.select import delete_apart, fill, max_apart

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


def keep_best(scores: Floats, costs: Ints, free: Mask, budget: int) -> Mask:
    """The highest scores that fit."""
    kept = np.zeros(len(scores), dtype=bool)
    kept[free] = fill(scores[free], costs[free], budget)
    return kept


def keep_shares(scores: Floats, costs: Ints, free: Mask, budget: int, chunk: Ints) -> Mask:
    """The highest scores of every chunk, each chunk keeping the same share of its free tokens
    (largest remainders rounded up). ``chunk`` int64 ``[units]`` is each unit's chunk. What whole
    units leave over goes to the best of the rest."""
    owed = np.bincount(chunk[free], weights=costs[free])
    shares = owed * (budget / max(1.0, owed.sum()))
    whole = np.floor(shares + 1e-9).astype(np.int64)
    whole[np.argsort(whole - shares, kind="stable")[: budget - int(whole.sum())]] += 1
    kept = np.zeros(len(scores), dtype=bool)
    for c, share in enumerate(whole.tolist()):
        kept |= keep_best(scores, costs, free & (chunk == c), share)
    rest = budget - int(costs[kept].sum())
    return kept | keep_best(scores, costs, free & ~kept, rest) if rest else kept


def keep_apart(scores: Floats, costs: Ints, free: Mask, budget: int) -> Mask:
    """All but the cheapest set of free units, no two of them adjacent, that brings the cost down
    to ``budget``; if no such set is large enough, the largest. What is deleted beyond need
    because units cost several tokens is put back, best first."""
    excess = int(costs[free].sum()) - budget
    low, high = 1, min(excess, max_apart(free))
    deleted = delete_apart(scores, free, high)
    while low < high and (costs[deleted] > 1).any():
        middle = (low + high) // 2
        fewer = delete_apart(scores, free, middle)
        if costs[fewer].sum() >= excess:
            high, deleted = middle, fewer
        else:
            low = middle + 1
    spare = int(costs[deleted].sum()) - excess
    back = keep_best(scores, costs, deleted, spare) if spare > 0 else np.zeros_like(free)
    return free & (~deleted | back)

"""Slow references for choosing units: a table over (unit, deletions), and trying every set."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np


def least_apart_by_table(scores, deletable, count) -> float:
    """Least total score of exactly ``count`` deletions, no two adjacent; inf if impossible.
    The O(n * count) recurrence: skip a unit, or delete it and skip the one before."""
    previous = np.full(count + 1, np.inf)
    previous[0] = 0.0
    before, current = previous.copy(), previous.copy()
    for score, allowed in zip(scores, deletable, strict=True):
        following = current.copy()
        if allowed:
            following[1:] = np.minimum(following[1:], before[:-1] + score)
        before, current = current, following
    return float(current[count])


def least_apart_by_trial(scores, deletable, count) -> float:
    """The same by trying every set."""
    best = np.inf
    for chosen in combinations(np.flatnonzero(deletable).tolist(), count):
        if all(b - a > 1 for a, b in pairwise(chosen)):
            best = min(best, sum(float(scores[i]) for i in chosen))
    return best


def fill_by_sorting(scores, costs, budget) -> list[bool]:
    """Units in falling score, then rising index, each kept if it still fits."""
    kept = [False] * len(scores)
    for unit in sorted(range(len(scores)), key=lambda u: (-scores[u], u)):
        if costs[unit] <= budget:
            kept[unit] = True
            budget -= costs[unit]
    return kept

"""Making received attention comparable between early and late tokens.

Under causal attention an early token is seen by more queries than a late one, and by queries
with fewer tokens to choose from: with no information at all, the first of 2,000 tokens receives
8 and the last 0.0005. The DAC paper uses the plain sum; the other norms take that slope out.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from narrows.errors import ConfigError

Floats = NDArray[np.float64]
AttnNorm = Literal["sum", "per_query", "vs_uniform", "rank"]

TAIL = 16
"""Uniform attention to the very last tokens nears zero, and dividing by it would make noise of
them; it is taken to be at least that of the TAIL-th token from the end."""


def check_attn_norm(how: str) -> None:
    """Raises ConfigError unless ``how`` is an AttnNorm."""
    if how not in get_args(AttnNorm):
        raise ConfigError(f"attn_norm {how!r} is not one of {', '.join(get_args(AttnNorm))}")


def normalise(mass: Floats, first: int, how: AttnNorm, windows: tuple[int | None, ...]) -> Floats:
    """Normalise the scored tokens of one pass.

    ``mass`` ``[n]`` is the attention the ``n`` tokens fed together received, mean over layers and
    heads; those from ``first`` on are scored and returned. ``windows`` has one entry a layer.

    "sum" leaves the sum; "per_query" divides it by the number of queries that see the token;
    "vs_uniform" by what the token would receive if every query looked at all it sees alike (1.0
    means as much as that); "rank" replaces it by its rank among the scored, over their number.
    """
    scored = mass[first:]
    if how == "per_query":
        return np.asarray(scored / queries_seeing(len(mass), windows)[first:])
    if how == "vs_uniform":
        even = uniform_mass(len(mass), windows)
        return np.asarray(scored / np.maximum(even, even[max(0, len(mass) - TAIL)])[first:])
    if how == "rank":
        return average_ranks(scored) / max(1, len(scored))
    return scored


def uniform_mass(n: int, windows: tuple[int | None, ...]) -> Floats:
    """What each of ``n`` tokens receives from uniform attention: the sum over the queries that
    see it of one over the tokens they see; mean over layers. float64 ``[n]``"""
    total = np.zeros(n)
    for window in set(windows):
        reach = window or n
        upto = np.concatenate([[0.0], np.cumsum(1.0 / np.minimum(np.arange(1, n + 1), reach))])
        total += windows.count(window) * (upto[np.minimum(n, np.arange(n) + reach)] - upto[:-1])
    return total / len(windows)


def queries_seeing(n: int, windows: tuple[int | None, ...]) -> Floats:
    """How many queries see each of ``n`` tokens, its own included; mean over layers. ``[n]``"""
    after = n - np.arange(n)
    return np.asarray(np.mean([np.minimum(after, w or n) for w in windows], axis=0))


def average_ranks(values: Floats) -> Floats:
    """Ranks from 1, smallest first; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[group], dtype=np.float64)

"""Offers of guesses that are told apart by their place alone."""

from __future__ import annotations

import functools
from typing import Any

from narrows.contracts import Offer, Sort


@functools.cache
def _sorts(kind: str, first: float, later: float) -> tuple[Sort, ...]:
    return Sort.by_place(first, later, 16)


def offer(kind: str, k: int, first: float = 0.5, later: float = 0.6, **told: Any) -> Offer:
    return Offer(kind, _sorts(kind, first, later)[:k], **told)

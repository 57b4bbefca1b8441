"""Cutting a long text into chunks a model reads one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from narrows.compression.units import TokenizedText, Units, make_units
from narrows.contracts import Span

Breaks = NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens fed together. The first ``lead`` of them (BOS, left context) give context and are
    not scored; token ``lead`` is token ``start`` of the text."""

    ids: list[int]
    lead: int
    start: int

    @property
    def first(self) -> int:
        """Index in ``ids`` of the first scored token: nothing predicts the very first one."""
        return max(self.lead, 1)

    @property
    def scored(self) -> slice:
        """The tokens of the text that this chunk scores."""
        offset = self.start - self.lead
        return slice(self.first + offset, len(self.ids) + offset)


def chunk_breaks(tokens: TokenizedText, units: Units) -> Breaks:
    """How good it is to end a chunk after each token: 2 at a sentence's end, 1 at a unit's,
    0 inside a unit. int8 ``[n]``; the marks stay right when whole units are removed."""
    breaks = np.zeros(len(tokens.ids), dtype=np.int8)
    ends = units.bounds[1:] - 1
    breaks[ends] = 1
    sentences = make_units(tokens, "sentence").bounds[1:] - 1
    breaks[np.intersect1d(sentences, ends)] = 2
    return breaks


def split(n: int, breaks: Breaks | None, limit: int) -> list[Span]:
    """Cut ``n`` tokens into nearly equal chunks of at most ``limit`` (0: no limit), at sentence
    ends where there are any, else between units; only a unit longer than ``limit`` is cut."""
    spans: list[Span] = []
    start = 0
    while start < n:
        stop = n if limit == 0 or n - start <= limit else _cut(start, n, breaks, limit)
        spans.append((start, stop))
        start = stop
    return spans


def _cut(start: int, n: int, breaks: Breaks | None, limit: int) -> int:
    """Where the chunk that begins at ``start`` ends, searched backwards from a fair share of what
    is left (a little more, for a sentence's end) to half of that."""
    left = n - start
    fair = -(-left // -(-left // limit))
    if breaks is None:
        return start + fair
    half = fair // 2
    for worth, latest in ((2, min(limit, fair + limit // 8)), (1, fair)):
        good = np.flatnonzero(breaks[start + half : start + latest] >= worth)
        if len(good):
            return start + half + int(good[-1]) + 1
    ends = np.flatnonzero(breaks[start : start + limit])
    return start + (int(ends[-1]) + 1 if len(ends) else fair)


def pack(chunks: Sequence[Chunk], limit: int) -> Iterator[list[Chunk]]:
    """Neighbouring chunks in groups of at most ``limit`` tokens (or one longer chunk)."""
    group: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if group and size + len(chunk.ids) > limit:
            yield group
            group, size = [], 0
        group.append(chunk)
        size += len(chunk.ids)
    if group:
        yield group

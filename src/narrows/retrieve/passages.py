"""Cutting a document into passages of bounded size, at the best boundaries there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import regex

from narrows.contracts import Document, Span
from narrows.errors import ConfigError

Counter = Callable[[str], int]
"""Size of a text, in characters, tokens or whatever the caller bounds."""

_LINE_END = r"(?:\r\n|[\r\n\u2028\u2029])"
_CLOSERS = r"[\p{Pe}\p{Pf}\"']*+"
_CUTS = (  # what may be cut after, best first: paragraphs, sentences and lines, words
    regex.compile(rf"(?:[ \t]*+{_LINE_END}){{2,}}+"),
    regex.compile(rf"[.!?…]++{_CLOSERS}\s++(?!\p{{Ll}})|[。！？]++{_CLOSERS}\s*+|{_LINE_END}\s*+"),
    regex.compile(r"\s++"),
)
_GRAPHEME = regex.compile(r"\X")


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of a document: ``text`` is the document's text between the ends of ``span``
    (characters). ``document`` is the document's name."""

    document: str
    span: Span
    text: str


def split_passages(document: Document, size: int, count: Counter = len) -> list[Passage]:
    """Cut ``document`` into passages that together are the document, in order, unchanged.

    Whole paragraphs share a passage while they fit; a paragraph too large for one is cut into
    sentences, a sentence into words, a word between characters as a reader sees them.

    Args:
        document: what to cut.
        size: at least 1; no passage counts more, except a single character that does on its own.
            That holds for a ``count`` with ``count(a + b) <= count(a) + count(b)``.
        count: the size of a text; by default its characters. Called on every piece, not on
            every passage.

    Raises ConfigError for a ``size`` below 1.
    """
    if size < 1:
        raise ConfigError(f"passage size must be at least 1 (given: {size})")
    spans: list[Span] = []
    start = end = used = 0
    for piece_end, cost in _pieces(document.text, (0, len(document.text)), size, count, 0):
        if end > start and used + cost > size:
            spans.append((start, end))
            start, used = end, 0
        end, used = piece_end, used + cost
    if end > start:
        spans.append((start, end))
    return [Passage(document.name, (a, b), document.text[a:b]) for a, b in spans]


def _pieces(
    text: str, span: Span, size: int, count: Counter, level: int
) -> Iterator[tuple[int, int]]:
    """Ends and sizes of the largest pieces of ``span`` that fit, by cut ``level`` and worse."""
    if level == len(_CUTS):
        ends = [m.end() for m in _GRAPHEME.finditer(text, *span)]
        yield from _halves(text, span[0], ends, size, count)
        return
    start, stop = span
    ends = [m.end() for m in _CUTS[level].finditer(text, start, stop)]
    for end in ends if ends and ends[-1] == stop else [*ends, stop]:
        cost = count(text[start:end])
        if cost <= size:
            yield end, cost
        else:
            yield from _pieces(text, (start, end), size, count, level + 1)
        start = end


def _halves(
    text: str, start: int, ends: list[int], size: int, count: Counter
) -> Iterator[tuple[int, int]]:
    """Pieces of a text without any gap: halved, and halved again, until they fit."""
    cost = count(text[start : ends[-1]])
    if cost <= size or len(ends) == 1:
        yield ends[-1], cost
        return
    middle = len(ends) // 2
    yield from _halves(text, start, ends[:middle], size, count)
    yield from _halves(text, ends[middle - 1], ends[middle:], size, count)

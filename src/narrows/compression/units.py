"""Text as tokens that own characters, and tokens as units that are kept or dropped whole.

Output is always built from characters of the source, never by decoding ids: decoding breaks
characters that byte-level tokenizers split, and changes spacing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import regex
from numpy.typing import NDArray

from narrows.errors import ConfigError, InputError

if TYPE_CHECKING:
    from narrows.contracts import Span

Granularity = Literal["token", "word", "phrase", "sentence"]
Pooling = Literal["mean", "max"]

PHRASE_WORDS = 5
"""Most words in a phrase; a clause between two punctuation marks is often far longer."""

_GRAPHEME = regex.compile(r"\X")
_WORD_EDGE = regex.compile(r"(?w)\b")
_CLAUSE_END = regex.compile(r"[,;:.!?…)\]}]+(?=\s|\Z)|[、，；：。！？｡]+|\R+")
_CLOSERS = r"""["'’”»)\]）】」』]*"""
_TITLES = r"Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e"
_SENTENCE_END = regex.compile(
    rf"(?:[。！？｡]+{_CLOSERS}"
    rf"|(?:[!?…]+|(?<!\b(?:\p{{Lu}}|{_TITLES}))\.+){_CLOSERS}(?=\s+\P{{Ll}}|\s*\Z))\R*"
    r"|\R+"
)


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text, its token ids and the characters each token owns.

    ``spans`` partition ``text``: token ``t`` owns from the end of token ``t - 1`` to its own end,
    and the last one owns the rest, so whitespace a tokenizer leaves out of its offsets is never
    lost. Later pieces of one split character own nothing. ``shared`` are the indices of tokens
    that share a source character with the token before them.
    """

    text: str
    ids: list[int]
    spans: list[Span]
    shared: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Units:
    """Groups of neighbouring tokens: unit ``u`` is ``tokens[bounds[u]:bounds[u + 1]]``.

    ``bounds`` is int64 ``[units + 1]``, from 0 to the number of tokens.
    """

    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def costs(self) -> NDArray[np.int64]:
        """Tokens in each unit, int64 ``[units]``, all at least 1."""
        return np.diff(self.bounds)


def encode(text: str, tokenizer: Any) -> Any:
    """``text`` through a fast tokenizer as plain text: no special tokens added, strings that look
    like special tokens split like any other, nothing truncated. Returns ids and offsets.

    Raises ConfigError without a fast tokenizer, InputError for text that is not valid Unicode.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("compression needs a fast tokenizer (one that reports character offsets)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds a lone surrogate at character {error.start}; decode it as UTF-8 first"
        ) from None
    return tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )


def tokenize(text: str, tokenizer: Any) -> TokenizedText:
    """Tokens of ``text`` with owned spans. Raises as ``encode`` does."""
    if not text:
        return TokenizedText(text, [], [])
    encoding = encode(text, tokenizer)
    spans: list[Span] = []
    shared: set[int] = set()
    owned = 0
    for t, (start, end) in enumerate(encoding["offset_mapping"]):
        if start < owned:
            shared.add(t)
        spans.append((owned, max(owned, end)))
        owned = spans[-1][1]
    if spans:
        spans[-1] = (spans[-1][0], len(text))
    return TokenizedText(text, list(encoding["input_ids"]), spans, frozenset(shared))


def make_units(tokens: TokenizedText, granularity: Granularity = "token") -> Units:
    """Group tokens. No unit splits a code point or a grapheme cluster (UAX 29: joined emoji,
    flags, combining marks, CRLF), whatever the granularity.

    ``word`` ends at Unicode word boundaries, with the spaces before it. ``phrase`` ends at
    punctuation, a newline or after PHRASE_WORDS words. ``sentence`` ends at ``.!?`` before
    whitespace (not after initials and a few titles, nor before a lower-case letter), at CJK
    full stops and at newlines. A token that crosses such an end belongs to the earlier unit.
    Raises ConfigError for another granularity.
    """
    if granularity not in get_args(Granularity):
        choices = ", ".join(get_args(Granularity))
        raise ConfigError(f"granularity {granularity!r} is not one of {choices}")
    first, starts = _whole_characters(tokens)
    if granularity != "token" and len(first) > 1:
        cuts = np.asarray(sorted(_CUTS[granularity](tokens.text)), dtype=np.int64)
        chosen = np.unique(np.searchsorted(starts, cuts))
        first = first[np.union1d([0], chosen[chosen < len(first)])]
    return Units(np.append(first, len(tokens.ids)).astype(np.int64))


def _whole_characters(tokens: TokenizedText) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token and first character of every smallest unit that splits no character."""
    edges = {match.start() for match in _GRAPHEME.finditer(tokens.text)} - {0}
    first = [
        t
        for t, (start, end) in enumerate(tokens.spans)
        if t == 0 or (end > start and start in edges and t not in tokens.shared)
    ]
    starts = [tokens.spans[t][0] for t in first]
    return np.asarray(first, dtype=np.int64), np.asarray(starts, dtype=np.int64)


def _word_cuts(text: str) -> list[int]:
    """Word boundaries, except between a space and what follows it: tokens lead with spaces."""
    edges = (match.start() for match in _WORD_EDGE.finditer(text))
    return [p for p in edges if p and not (text[p - 1].isspace() and text[p - 1] not in "\r\n")]


def _phrase_cuts(text: str) -> list[int]:
    clauses = {match.end() for match in _CLAUSE_END.finditer(text)}
    cuts: list[int] = []
    words = 0
    for p in sorted(clauses.union(_word_cuts(text))):
        words += text[p - 1].isalnum()
        if p in clauses or words == PHRASE_WORDS:
            cuts.append(p)
            words = 0
    return cuts


def _sentence_cuts(text: str) -> list[int]:
    return [match.end() for match in _SENTENCE_END.finditer(text)]


_CUTS = {"word": _word_cuts, "phrase": _phrase_cuts, "sentence": _sentence_cuts}


def pool(
    units: Units, token_scores: NDArray[np.float64], how: Pooling = "mean"
) -> NDArray[np.float64]:
    """One score a unit, float64 ``[units]``, from ``token_scores`` ``[tokens]``."""
    if how not in ("mean", "max"):
        raise ConfigError(f"unit scores are pooled by mean or max, not {how!r}")
    if not len(units):
        return np.zeros(0)
    scores = np.asarray(token_scores, dtype=np.float64)
    if how == "max":
        return np.asarray(np.maximum.reduceat(scores, units.bounds[:-1]))
    return np.asarray(np.add.reduceat(scores, units.bounds[:-1]) / units.costs)


def runs(
    chosen: NDArray[np.int64], costs: NDArray[np.int64], size: int
) -> Iterator[NDArray[np.int64]]:
    """Cut ``chosen`` units into runs of at most ``size`` tokens (or one larger unit)."""
    start = used = 0
    for i, cost in enumerate(costs[chosen].tolist()):
        if i > start and used + cost > size:
            yield chosen[start:i]
            start, used = i, 0
        used += cost
    yield chosen[start:]


def tokens_of(units: Units, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the tokens of ``chosen`` units, in order."""
    return np.flatnonzero(np.repeat(np.isin(np.arange(len(units)), chosen), units.costs))

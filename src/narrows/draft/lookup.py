"""Prompt lookup: what followed the same few tokens the last time they stood in the text.

After Saxena, "Prompt Lookup Decoding" (2023): the longest match first, and the most recent of
several matches.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from narrows.config import Settings
from narrows.contracts import Asked, Drafter, Offer, Sort
from narrows.ops.ngrams import Repeat, repeats

EXPECTED = {
    1: (0.3, 0.5, 0.15),
    2: (0.5, 0.75, 0.25),
    3: (0.65, 0.8, 0.3),
    4: (0.7, 0.85, 0.3),
    5: (0.75, 0.9, 0.4),
    8: (0.85, 0.97, 0.5),
    16: (0.93, 0.98, 0.7),
    32: (0.95, 0.99, 0.75),
}
"""Chances of a token to begin with, ONCE, ALIKE and APART, where it and those guessed before it
would go on at least so many tokens that match: a text that has long gone like an earlier one goes
on like it."""
FAR = max(EXPECTED)
"""Tokens that match, as far as they are told apart."""
MOST = 64
"""Tokens of the longest draft there may be."""


def _sorts() -> list[tuple[Sort, ...]]:
    """By the number of tokens that match, to the end of any draft; none match at 0."""
    found: list[tuple[Sort, ...]] = [()]
    for size in range(1, FAR + MOST + 1):
        found.append(tuple(map(Sort, EXPECTED[size])) if size in EXPECTED else found[-1])
    return found


SORTS = _sorts()


class LookupOptions(Settings):
    """``most`` tokens of a draft; ``longest`` to ``shortest`` matched tokens are tried."""

    most: Annotated[int, Field(ge=1, le=MOST)] = 8
    longest: Annotated[int, Field(ge=1, le=16)] = 4
    shortest: Annotated[int, Field(ge=1)] = 2

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError("shortest must not exceed longest")
        return self


class Lookup(Drafter):
    """Costs next to nothing, and guesses well where a text repeats its prompt or itself."""

    name = "lookup"

    def __init__(self, options: LookupOptions) -> None:
        self.most = options.most
        self.longest, self.shortest = options.longest, options.shortest
        self._texts: dict[int, array[int]] = defaultdict(lambda: array("i"))
        """By the sequence's number, as the search reads them."""

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """See Drafter. One offer at most, of the longest match."""
        offers: list[list[Offer]] = []
        for one, (size, behind, went) in zip(asked, self._repeats(asked), strict=True):
            sorts = [known[how] for known, how in zip(SORTS[size:], went[: one.k], strict=False)]
            tokens = one.tokens[behind : behind + len(sorts)]
            offers.append([Offer(self.name, tuple(sorts), tokens=tokens)] if sorts else [])
        return offers

    def _repeats(self, asked: Sequence[Asked]) -> list[Repeat]:
        texts = []
        for one in asked:
            text = self._texts[one.number]
            text.extend(one.tokens[len(text) :])
            texts.append(text)
        return repeats(texts, self.shortest, self.longest, FAR, self.most)

    def forget(self, number: int) -> None:
        """See Drafter."""
        self._texts.pop(number, None)


def lookup(target: object, **options: Any) -> Lookup:
    """Prompt lookup with LookupOptions, for any target. Raises ConfigError."""
    return Lookup(LookupOptions(**options))

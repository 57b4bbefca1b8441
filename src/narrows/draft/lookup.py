"""Prompt lookup: what followed the same few tokens the last time they stood in the text.

After Saxena, "Prompt Lookup Decoding" (2023), with an index in place of a search, the longest
match first, and the most recent of several matches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from narrows.config import Settings
from narrows.contracts import Asked, Draft, Drafter, Offer

EXPECTED = {
    1: (0.3, 0.5),
    2: (0.5, 0.75),
    3: (0.6, 0.8),
    4: (0.7, 0.8),
    5: (0.8, 0.85),
    8: (0.85, 0.9),
    16: (0.95, 0.95),
    32: (0.98, 0.98),
}
"""Chances of the first token and of later ones to begin with, where at least so many tokens match:
a text that has gone like an earlier one for long goes on like it."""

SIZES = sorted(EXPECTED)
"""Tokens that match, as far as they are told apart."""


class LookupOptions(Settings):
    """``most`` tokens of a draft; ``longest`` to ``shortest`` matched tokens are tried."""

    most: Annotated[int, Field(ge=1, le=64)] = 8
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
        self._indexes: dict[int, _Index] = {}

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """See Drafter. One offer at most, of the longest match."""
        found = [self._match(one) for one in asked]
        return [
            [self._offer(one, size, behind)] if size else []
            for one, (size, behind) in zip(asked, found, strict=True)
        ]

    def _offer(self, one: Asked, size: int, behind: int) -> Offer:
        tokens = one.tokens
        if size == self.longest:  # else no more can match, or a longer one had been found
            most = min(behind, SIZES[-1])
            while size < most and tokens[behind - size - 1] == tokens[-size - 1]:
                size += 1
        least = SIZES[bisect_right(SIZES, size) - 1]
        k = min(one.k, self.most, len(tokens) - behind)
        return Offer(f"{self.name}{least}", k, *EXPECTED[least])

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See Drafter."""
        found = [self._match(one) for one in asked]
        return [
            Draft(list(one.tokens[behind : behind + one.k]) if size else [])
            for one, (size, behind) in zip(asked, found, strict=True)
        ]

    def _match(self, one: Asked) -> tuple[int, int]:
        """Tokens matched, 0 if none, and the place behind the match."""
        index, tokens = self._indexes.get(one.number), one.tokens
        if index is None:
            index = self._indexes[one.number] = _Index()
        index.read(tokens, self.longest, self.shortest)
        last = tuple(tokens[-self.longest :])
        for size in range(len(last), self.shortest - 1, -1):
            behind = index.places.get(last[-size:])
            if behind is not None:
                return size, behind
        return 0, 0

    def forget(self, number: int) -> None:
        """See Drafter."""
        self._indexes.pop(number, None)


def lookup(target: object, **options: Any) -> Lookup:
    """Prompt lookup with LookupOptions, for any target. Raises ConfigError."""
    return Lookup(LookupOptions(**options))


class _Index:
    """Where the text went on after each run of tokens, as last seen before its end."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, ...], int] = {}
        self.read_to = 0

    def read(self, tokens: Sequence[int], longest: int, shortest: int) -> None:
        """Take in what ``tokens`` has gained; the end itself is what is looked up, so it waits."""
        for stop in range(max(self.read_to, shortest), len(tokens)):
            last = tuple(tokens[max(0, stop - longest) : stop])
            for size in range(shortest, len(last) + 1):
                self.places[last[-size:]] = stop
        self.read_to = max(self.read_to, len(tokens))

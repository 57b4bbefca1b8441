"""Prompt lookup: what followed the same few tokens the last time they stood in the text.

After Saxena, "Prompt Lookup Decoding" (2023), with an index in place of a search, the longest
match first, and the most recent of several matches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from narrows.config import Settings
from narrows.contracts import Asked, Draft, Drafter, Offer, Sort

ONCE, ALIKE, APART = range(3)
"""What is known of how a text went on behind a run of tokens: it was there once, or went on alike
the last two times, or not."""

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


def _sorts() -> list[tuple[Sort, ...]]:
    """By the number of tokens that match, as far as they are told apart; none match at 0."""
    found: list[tuple[Sort, ...]] = [()]
    for size in range(1, max(EXPECTED) + 1):
        found.append(tuple(map(Sort, EXPECTED[size])) if size in EXPECTED else found[-1])
    return found


SORTS = _sorts()


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
        tokens, went = one.tokens, self._indexes[one.number].went
        k = min(one.k, self.most, len(tokens) - behind)
        runs = [min(size + i, self.longest) - self.shortest for i in range(k)]
        if size == self.longest:  # else no more can match, or a longer one had been found
            most = min(behind, len(SORTS) - 1)
            while size < most and tokens[behind - size - 1] == tokens[-size - 1]:
                size += 1
        sorts = tuple(
            SORTS[min(size + i, len(SORTS) - 1)][went[run][behind + i]]
            for i, run in enumerate(runs)
        )
        return Offer(self.name, sorts)

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
            index = self._indexes[one.number] = _Index(self.longest, self.shortest)
        index.read(tokens)
        last, found = tuple(tokens[-self.longest :]), (0, 0)
        for size in range(self.shortest, len(last) + 1):
            behind = index.places.get(last[-size:])
            if behind is None:  # nor is anything longer there
                break
            found = size, behind
        return found

    def forget(self, number: int) -> None:
        """See Drafter."""
        self._indexes.pop(number, None)


def lookup(target: object, **options: Any) -> Lookup:
    """Prompt lookup with LookupOptions, for any target. Raises ConfigError."""
    return Lookup(LookupOptions(**options))


class _Index:
    """Where the text went on after each run of ``shortest`` to ``longest`` tokens, as last seen
    before its end. ``went[n][i]`` tells how token ``i`` followed the run of ``shortest + n`` before
    it, as far as that had been there: ONCE, ALIKE or APART."""

    def __init__(self, longest: int, shortest: int) -> None:
        self.longest, self.shortest = longest, shortest
        self.places: dict[tuple[int, ...], int] = {}
        self.went = [bytearray(shortest) for _ in range(shortest, longest + 1)]

    def read(self, tokens: Sequence[int]) -> None:
        """Take in what ``tokens`` has gained; the end itself is what is looked up, so it waits."""
        for stop in range(len(self.went[0]), len(tokens)):
            last = tuple(tokens[max(0, stop - self.longest) : stop])
            for size, went in enumerate(self.went, self.shortest):
                how = ONCE
                if size <= stop:
                    run = last[-size:]
                    before = self.places.get(run)
                    if before is not None:
                        how = ALIKE if tokens[before] == tokens[stop] else APART
                    self.places[run] = stop
                went.append(how)

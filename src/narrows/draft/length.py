"""How many guesses are worth verifying in a step, for each sequence.

A guess is worth its chance of being committed; verifying it costs what one more row costs the
step. Guesses are taken in order of their chances, over all sequences, as long as tokens per
second rise. None at all is a choice, so speculation turns itself off where it does not pay.

The chances come from what became of earlier guesses of the same kind and place, so a choice
depends on the past and never on the guesses it drops, which would bend the distribution of
sampled text (sheet 6.5).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from narrows.contracts import Offer

FIRST_PRIOR, LATER_PRIOR = (1.0, 2.0), (2.0, 3.0)
"""Hits and trials a kind of guess is credited with before it has been tried, at its first place and
at later ones: where one guess was right, the next is likelier to be."""
OWN_TRIALS = 4.0
"""Trials of a sequence's own after which its record weighs as much as that of its kind."""
MEMORY = 0.98
"""Weight of the past at each new trial, and at each new step."""
FADING = 0.999
"""Weight of the past each time a kind is left untried, so that it is given another chance."""
CAUTION = 1.25
"""What verifying guesses is taken to cost, of what it seems to, so that doubtful gains are left."""
ROW_COST = 0.12
"""What a row adds to a step, of a step of one row, until steps have shown it."""
TRUST = 0.5
"""Spread of rows (their variance) at which steps taken count as much as ROW_COST."""
LEAST = 0.1
"""Share of the mean step below which no step is expected."""


class StepTimes:
    """Seconds of a step by its rows of tokens, learnt from the steps taken: a straight line through
    their mean, the latest weighing most, steeper or flatter than ROW_COST has it as far as steps of
    different rows have shown that."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._spread = self._joint = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Note a step of ``rows`` tokens. One that takes far too long counts as twice what was
        expected."""
        if self._weight:
            seconds = min(seconds, 2 * self(rows))
        self._weight = self._weight * MEMORY + 1
        share = 1 / self._weight
        more_rows, longer = rows - self._rows, seconds - self._seconds
        self._rows += share * more_rows
        self._seconds += share * longer
        self._spread = (1 - share) * (self._spread + share * more_rows**2)
        self._joint = (1 - share) * (self._joint + share * more_rows * longer)

    def __call__(self, rows: int) -> float:
        """Seconds expected of a step of ``rows`` tokens, in an arbitrary unit before the first
        observation."""
        if not self._weight:
            return 1 + ROW_COST * (rows - 1)
        usual = ROW_COST * self._seconds / (1 + ROW_COST * (self._rows - 1))
        slope = max(0.0, (self._joint + TRUST * usual) / (self._spread + TRUST))
        return max(self._seconds + slope * (rows - self._rows), LEAST * self._seconds)


class _Record:
    """Hits and trials of guesses at one place, the latest weighing most."""

    def __init__(self, hits: float, trials: float) -> None:
        self.hits, self.trials = hits, trials

    def add(self, hit: bool) -> None:
        self.hits = self.hits * MEMORY + hit
        self.trials = self.trials * MEMORY + 1


class DraftLength:
    """Chooses draft lengths and learns from their outcomes.

    ``times`` learns what steps cost, drafting included.
    """

    def __init__(self) -> None:
        self.times = StepTimes()
        self._kinds: dict[tuple[str, int], _Record] = {}
        self._own: dict[int, dict[tuple[str, int], _Record]] = defaultdict(
            lambda: defaultdict(lambda: _Record(0.0, 0.0))
        )

    def survival(self, number: int, kind: str, place: int) -> float:
        """Chance that the guess at ``place`` stays, given that those before it did."""
        common, own = self._common(kind, place), self._own[number][kind, place]
        rate = common.hits / common.trials
        return (own.hits + OWN_TRIALS * rate) / (own.trials + OWN_TRIALS)

    def expected(self, number: int, offer: Offer) -> float:
        """Guesses of an offer that would stay if all were verified."""
        total, chance = 0.0, 1.0
        for place in range(offer.k):
            chance *= self.survival(number, offer.kind, place)
            total += chance
        return total

    def choose(self, offers: Sequence[tuple[int, Offer]], rows: int, decoding: int) -> list[int]:
        """Guesses to verify of each offer, given with its sequence's number. Without any, the
        step has ``rows`` rows, and ``decoding`` sequences get a token each."""
        lengths = [0] * len(offers)
        heap: list[tuple[float, int]] = []

        def push(i: int, chance: float) -> None:
            number, offer = offers[i]
            if lengths[i] < offer.k:
                chance *= self.survival(number, offer.kind, lengths[i])
                heapq.heappush(heap, (-chance, i))

        for i in range(len(offers)):
            push(i, 1.0)
        expected, plain = float(decoding), self.times(rows)
        best, chosen = expected / plain, list(lengths)
        while heap:
            negative, i = heapq.heappop(heap)
            lengths[i] += 1
            rows, expected = rows + 1, expected - negative
            speed = expected / (plain + CAUTION * (self.times(rows) - plain))
            if speed > best:
                best, chosen = speed, list(lengths)
            push(i, -negative)
        return chosen

    def learn(self, number: int, kind: str, tried: int, kept: int) -> None:
        """Note that the first ``kept`` of ``tried`` guesses of an offered ``kind`` stayed."""
        if not tried:
            record, (hits, trials) = self._common(kind, 0), FIRST_PRIOR
            record.hits = hits + (record.hits - hits) * FADING
            record.trials = trials + (record.trials - trials) * FADING
        for place in range(min(kept + 1, tried)):
            for record in (self._common(kind, place), self._own[number][kind, place]):
                record.add(place < kept)

    def _common(self, kind: str, place: int) -> _Record:
        prior = LATER_PRIOR if place else FIRST_PRIOR
        return self._kinds.setdefault((kind, place), _Record(*prior))

    def forget(self, number: int) -> None:
        """Drop a sequence's own record."""
        self._own.pop(number, None)

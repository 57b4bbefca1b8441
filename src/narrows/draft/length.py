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

PRIOR_HITS, PRIOR_TRIALS = 2.0, 3.0
"""What a kind of guess is credited with before it has been tried."""
OWN_TRIALS = 4.0
"""Trials of a sequence's own after which its record weighs as much as that of its kind."""
MEMORY = 0.98
"""Weight of the past at each new trial."""
FADING = 0.995
"""Weight of the past each time a kind is left untried, so that it is given another chance."""
GAIN = 1.1
"""Speed, against plain decoding, that a choice must promise before anything is drafted."""
ROW_COST = 0.02
"""What a row adds to a step, of a step of one row, until steps have shown it: reading the weights
takes most of the time of small steps."""
SHARE, DRIFT = 0.2, 0.02
"""Weight of a new step for its own number of rows, and for all others."""
MOST_ROWS = 512


class StepTimes:
    """Seconds of a step by its rows of tokens, learnt from the steps taken.

    Each number of rows has a factor on the expected shape ``1 + ROW_COST * (rows - 1)``. Rows not
    tried take theirs from their neighbours, and factors not used drift to the latest one, so that
    longer contexts, other loads and single slow steps do not mislead for long.
    """

    def __init__(self) -> None:
        self._factors: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        """Note a step of ``rows`` tokens; steps of more than MOST_ROWS teach nothing."""
        if not 1 <= rows <= MOST_ROWS:
            return
        new = seconds / _shape(rows)
        known = self._factors.get(rows)
        if known is not None:
            new = known + SHARE * (min(new, 2 * known) - known)
        for other, factor in self._factors.items():
            self._factors[other] = factor + DRIFT * (new - factor)
        self._factors[rows] = new

    def __call__(self, rows: int) -> float:
        """Seconds expected of a step of ``rows`` tokens, in an arbitrary unit before the first
        observation."""
        return _shape(rows) * self._factor(rows)

    def _factor(self, rows: int) -> float:
        if not self._factors:
            return 1.0
        below = max((r for r in self._factors if r <= rows), default=None)
        above = min((r for r in self._factors if r >= rows), default=None)
        if below is None or above is None or below == above:
            nearest = above if below is None else below
            assert nearest is not None
            return self._factors[nearest]
        low, high = self._factors[below], self._factors[above]
        return low + (high - low) * (rows - below) / (above - below)


def _shape(rows: int) -> float:
    return 1.0 + ROW_COST * (rows - 1)


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
        self._kinds: dict[tuple[str, int], _Record] = defaultdict(
            lambda: _Record(PRIOR_HITS, PRIOR_TRIALS)
        )
        self._own: dict[int, dict[tuple[str, int], _Record]] = defaultdict(
            lambda: defaultdict(lambda: _Record(0.0, 0.0))
        )

    def survival(self, number: int, kind: str, place: int) -> float:
        """Chance that the guess at ``place`` stays, given that those before it did."""
        common, own = self._kinds[kind, place], self._own[number][kind, place]
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
        expected = float(decoding)
        best, chosen = GAIN * expected / self.times(rows), list(lengths)
        while heap:
            negative, i = heapq.heappop(heap)
            lengths[i] += 1
            rows, expected = rows + 1, expected - negative
            speed = expected / self.times(rows)
            if speed > best:
                best, chosen = speed, list(lengths)
            push(i, -negative)
        return chosen

    def learn(self, number: int, kind: str, tried: int, kept: int) -> None:
        """Note that the first ``kept`` of ``tried`` guesses of an offered ``kind`` stayed."""
        if not tried:
            record = self._kinds[kind, 0]
            record.hits = PRIOR_HITS + (record.hits - PRIOR_HITS) * FADING
            record.trials = PRIOR_TRIALS + (record.trials - PRIOR_TRIALS) * FADING
        for place in range(min(kept + 1, tried)):
            for records in (self._kinds, self._own[number]):
                records[kind, place].add(place < kept)

    def forget(self, number: int) -> None:
        """Drop a sequence's own record."""
        self._own.pop(number, None)

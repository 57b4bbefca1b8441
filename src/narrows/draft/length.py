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
from dataclasses import dataclass

from narrows.contracts import Draft

PRIOR_HITS, PRIOR_TRIALS = 2.0, 3.0
"""What a kind of guess is credited with before it has been tried."""
OWN_TRIALS = 4.0
"""Trials of a sequence's own after which its record weighs as much as that of its kind."""
MEMORY = 0.98
"""Weight of the past at each new trial."""
FADING = 0.995
"""Weight of the past each time a kind is left untried, so that it is given another chance."""
GAIN = 1.03
"""Speed, against plain decoding, that a choice must promise before anything is drafted."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by its rows of tokens, and what each key that a row looks at adds.

    ``rows`` rise, the first is 1; between them time is linear, beyond the last it goes on so.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    per_key: float

    def __call__(self, rows: int, keys: int) -> float:
        """Seconds for ``rows`` tokens that look at ``keys`` keys in all."""
        place = 1
        while place < len(self.rows) - 1 and self.rows[place] < rows:
            place += 1
        (a, b), (x, y) = self.rows[place - 1 : place + 1], self.seconds[place - 1 : place + 1]
        return x + (y - x) * (rows - a) / (b - a) + keys * self.per_key


class _Record:
    """Hits and trials of guesses at one place, the latest weighing most."""

    def __init__(self, hits: float, trials: float) -> None:
        self.hits, self.trials = hits, trials

    def add(self, hit: bool) -> None:
        self.hits = self.hits * MEMORY + hit
        self.trials = self.trials * MEMORY + 1


class DraftLength:
    """Chooses draft lengths and learns from their outcomes.

    Args:
        step_time: what a step costs, drafting included.
    """

    def __init__(self, step_time: StepTime) -> None:
        self.step_time = step_time
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

    def choose(self, drafts: Sequence[tuple[int, Draft, int]], rows: int, keys: int) -> list[int]:
        """Guesses to verify of each draft, given with its sequence's number and length.

        ``rows`` and ``keys`` are those of the step without any draft; ``rows`` counts one row for
        each sequence that will get a token, with a draft or without.
        """
        lengths = [0] * len(drafts)
        heap: list[tuple[float, int]] = []

        def offer(i: int, chance: float) -> None:
            number, draft, _ = drafts[i]
            if lengths[i] < len(draft.tokens):
                chance *= self.survival(number, draft.kind, lengths[i])
                heapq.heappush(heap, (-chance, i))

        for i in range(len(drafts)):
            offer(i, 1.0)
        plain = rows / self.step_time(rows, keys)
        best, chosen, expected = plain * GAIN, list(lengths), float(rows)
        while heap:
            negative, i = heapq.heappop(heap)
            lengths[i] += 1
            rows, keys, expected = rows + 1, keys + drafts[i][2], expected - negative
            speed = expected / self.step_time(rows, keys)
            if speed > best:
                best, chosen = speed, list(lengths)
            offer(i, -negative)
        return chosen

    def learn(self, number: int, draft: Draft, tried: int, kept: int) -> None:
        """Note that the first ``kept`` of ``tried`` guesses of ``draft`` stayed."""
        if not tried and draft.tokens:
            record = self._kinds[draft.kind, 0]
            record.hits = PRIOR_HITS + (record.hits - PRIOR_HITS) * FADING
            record.trials = PRIOR_TRIALS + (record.trials - PRIOR_TRIALS) * FADING
        for place in range(min(kept + 1, tried)):
            for records in (self._kinds, self._own[number]):
                records[draft.kind, place].add(place < kept)

    def forget(self, number: int) -> None:
        """Drop a sequence's own record."""
        self._own.pop(number, None)

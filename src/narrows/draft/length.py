"""How many guesses are worth verifying in a step, for each sequence.

A guess is worth its chance of being committed; verifying it costs what one more row costs the
step, and making it what its kind of guesses costs to make, most of which the first one pays.
Guesses are taken in order of their chances, over all sequences, as long as tokens per second rise;
and once more without the kind that is dearest to make, which must be worth it. None at all is a
choice, so speculation turns itself off where it does not pay.

The chances come from what became of earlier guesses of the same kind and place, so a choice
depends on the past and never on the guesses it drops, which would bend the distribution of
sampled text (sheet 6.5).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass

from narrows.contracts import Offer

PRIOR_TRIALS = 10.0
"""Trials that a kind of guess is credited with before any, with what its offer expects of them."""
OWN_TRIALS = 4.0
"""Trials of a sequence's own after which its record weighs as much as that of its kind."""
MEMORY = 0.98
"""Weight of the past at each new trial, and at each new step."""
FADING = 0.999
"""Weight of the past at each step that leaves a kind untried: of its misses and of what making it
cost, so that it is tried again."""
CAUTION = 1.1
"""What drafting is taken to cost, of what it seems to, so that doubtful gains are left."""
WORTH = 1.05
"""Tokens a second that the kind dearest to make must promise, of what the others alone would give:
what it costs beyond what is timed, and being wrong about it, eat a smaller gain."""
ROW_COST = 0.06
"""What a row adds to a step, of a step of one row, until steps have shown it."""
TRUST = 0.5
"""Spread of rows (their variance) at which steps taken count as much as ROW_COST."""
NEGLIGIBLE = 0.005
"""Share of a step below which what making guesses costs decides nothing."""
LEAST = 0.1
"""Share of the mean time below which nothing is expected to be done."""


class Times:
    """Seconds by rows of tokens, learnt from what was done: a straight line through the mean, the
    latest weighing most, steeper or flatter than ROW_COST has it as far as different rows have
    shown that."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._spread = self._joint = 0.0

    @property
    def known(self) -> bool:
        """Whether anything has been observed."""
        return self._weight > 0

    def fade(self) -> None:
        """Expect a little less."""
        self._seconds *= FADING
        self._joint *= FADING

    def observe(self, rows: int, seconds: float) -> None:
        """Note what ``rows`` took. What takes far too long counts as twice what was expected."""
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
        """Seconds expected of ``rows``, in an arbitrary unit before the first observation."""
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

    def fade(self, hits: float, trials: float) -> None:
        """Come a little nearer to ``hits`` of ``trials``."""
        self.hits = hits + (self.hits - hits) * FADING
        self.trials = trials + (self.trials - trials) * FADING


@dataclass(frozen=True, slots=True)
class Plan:
    """What is verified in a step: of each sequence ``lengths`` guesses of the offer in ``taken``,
    if any. ``speed`` is what is expected of it, in tokens a second."""

    taken: list[Offer | None]
    lengths: list[int]
    speed: float


class DraftLength:
    """Chooses draft lengths and learns from their outcomes.

    ``steps`` learns what steps of the target cost by their rows, ``making[kind]`` what making
    guesses of a kind costs by their number.
    """

    def __init__(self) -> None:
        self.steps = Times()
        self.making: dict[str, Times] = defaultdict(Times)
        self._kinds: dict[tuple[str, int], _Record] = {}
        self._own: dict[int, dict[tuple[str, int], _Record]] = defaultdict(dict)

    def survival(self, number: int, offer: Offer, place: int) -> float:
        """Chance that the guess at ``place`` stays, given that those before it did."""
        common, own = self._common(offer, place), self._own[number].get((offer.kind, place))
        rate = common.hits / common.trials
        return (own.hits + OWN_TRIALS * rate) / (own.trials + OWN_TRIALS) if own else rate

    def expected(self, number: int, offer: Offer) -> float:
        """Guesses of an offer that would stay if all were verified."""
        total, chance = 0.0, 1.0
        for place in range(offer.k):
            chance *= self.survival(number, offer, place)
            total += chance
        return total

    def likeliest(self, number: int, offers: Sequence[Offer]) -> Offer | None:
        """The one of a sequence's offers of which most is expected, if there are any."""
        if len(offers) <= 1:
            return offers[0] if offers else None
        return max(offers, key=lambda offer: self.expected(number, offer))

    def choose(
        self, asked: Sequence[tuple[int, Sequence[Offer]]], rows: int, decoding: int
    ) -> Plan:
        """What to verify of the offers for each sequence, given with its number. Without any, the
        step has ``rows`` rows, and ``decoding`` sequences get a token each."""
        offers = {offer.kind: offer for _, some in asked for offer in some}
        kinds = set(offers)
        best = self._plan(asked, kinds, rows, decoding)
        dearest = max(kinds, key=lambda kind: self._seconds(kind, 1), default=None)
        if dearest is not None and self._seconds(dearest, 1) > NEGLIGIBLE * self.steps(rows):
            without = self._plan(asked, kinds - {dearest}, rows, decoding)
            if best.speed < WORTH * without.speed:
                best = without
        used = {offer.kind for offer in best.taken if offer is not None}
        for kind in kinds - used:
            self._common(offers[kind], 0).fade(offers[kind].first * PRIOR_TRIALS, PRIOR_TRIALS)
            for number, _ in asked:
                if (own := self._own[number].get((kind, 0))) is not None:
                    own.fade(0.0, 0.0)
            self.making[kind].fade()
        return best

    def _plan(
        self,
        asked: Sequence[tuple[int, Sequence[Offer]]],
        kinds: Set[str],
        rows: int,
        decoding: int,
    ) -> Plan:
        """The best that can be made of offers of ``kinds``."""
        offers = [
            self.likeliest(number, [offer for offer in some if offer.kind in kinds])
            for number, some in asked
        ]
        lengths = [0] * len(asked)
        made: Counter[str] = Counter()
        heap: list[tuple[float, int]] = []

        def push(i: int, offer: Offer | None, chance: float) -> None:
            if offer is not None and lengths[i] < offer.k:
                chance *= self.survival(asked[i][0], offer, lengths[i])
                heapq.heappush(heap, (-chance, i))

        for i, offer in enumerate(offers):
            push(i, offer, 1.0)
        expected, plain = float(decoding), self.steps(rows)
        a_row = CAUTION * (self.steps(rows + 1) - plain)
        seconds, making = plain, 0.0
        best, chosen = expected / plain, list(lengths)
        while heap:
            negative, i = heapq.heappop(heap)
            if -negative < best * a_row:  # nor can any of the rest, likely as this or less
                break
            offer = offers[i]
            assert offer is not None
            lengths[i] += 1
            count = made[offer.kind]
            making += self._seconds(offer.kind, count + 1)
            making -= self._seconds(offer.kind, count) if count else 0.0
            made[offer.kind] = count + 1
            seconds, expected = seconds + a_row, expected - negative
            speed = expected / (seconds + CAUTION * making)
            if speed > best:
                best, chosen = speed, list(lengths)
            push(i, offer, -negative)
        taken = [offer if k else None for offer, k in zip(offers, chosen, strict=True)]
        return Plan(taken, chosen, best)

    def _seconds(self, kind: str, count: int) -> float:
        """What making ``count`` guesses of a kind takes; nothing before it was first done."""
        times = self.making[kind]
        return times(count) if times.known else 0.0

    def learn(self, number: int, offer: Offer, tried: int, kept: int) -> None:
        """Note that the first ``kept`` of ``tried`` guesses of an ``offer`` stayed."""
        own = self._own[number]
        for place in range(min(kept + 1, tried)):
            self._common(offer, place).add(place < kept)
            own.setdefault((offer.kind, place), _Record(0.0, 0.0)).add(place < kept)

    def _common(self, offer: Offer, place: int) -> _Record:
        found = self._kinds.get((offer.kind, place))
        if found is None:
            expected = offer.later if place else offer.first
            found = _Record(expected * PRIOR_TRIALS, PRIOR_TRIALS)
            self._kinds[offer.kind, place] = found
        return found

    def forget(self, number: int) -> None:
        """Drop a sequence's own record."""
        self._own.pop(number, None)

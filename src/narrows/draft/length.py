"""How many guesses are worth verifying in a step, for each sequence.

A guess is worth its chance of being committed; verifying it costs what one more row costs the
step, and making it what its kind of guesses costs to make, most of which the first one pays.
Guesses are taken in order of their chances, over all sequences, as long as tokens per second rise;
and once more without the kind that is dearest to make, which must be worth it. None at all is a
choice, so speculation turns itself off where it does not pay.

The chances come from what became of earlier guesses of the same sort, be it their kind and place.
So a choice depends on the past and never on the guesses it drops, which would bend the distribution
of text that drawn guesses are part of (sheet 6.5). Chosen guesses bend nothing, as each stays only
if it is what would have been written without it; a drafter that chooses may therefore tell guesses
apart by what they are, or how sure it is of each. Drafts of the latter are made first, where
earlier ones were worth it, and a guess's chance is what became of those it was as sure of.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Container, Iterator, Sequence, Set
from dataclasses import dataclass

from narrows.contracts import Offer, Sort
from narrows.draft.learnt import SLOW, Record, Times

PRIOR_TRIALS = 10.0
"""Trials that a sort of guess is credited with before any, with what is expected of them."""
OWN_TRIALS = 4.0
"""Trials of a sequence's own after which its record weighs as much as that of all."""
CAUTION = 1.1
"""What drafting is taken to cost, of what it seems to, so that doubtful gains are left."""
GAIN = 1.06
"""Tokens a second that guesses must promise, beyond what such promises are known to lack, of what
is got without any; and drafts that tell, of what is got without those."""
WORTH = 1.05
"""Tokens a second that the kind dearest to make must promise, of what the others alone would give:
what it costs beyond what is timed, and being wrong about it, eat a smaller gain."""
NEGLIGIBLE = 0.005
"""Share of a step below which what making guesses costs decides nothing."""
CHEAP = 0.25
"""What a row may cost, of what it costs by the plane: a guess that is not worth so much is never
verified."""
SURENESS = 10
"""Parts of the way from 0 to 1 that a drafter's own chances are told apart by."""
DRAFTS = 48
"""Drafts of a kind that are remembered, to tell what making another one is worth. A new sequence
takes with it the share of one of those that decode, as texts differ in what drafts are worth."""
UNHEARD = 8
"""Drafts that are taken to have been as their kind is expected to be, as far as fewer are
remembered."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is verified in a step: of each sequence ``lengths`` guesses of the offer in ``taken``,
    if any. ``tokens`` are expected of it, ``speed`` of them a second of what is not spent on
    reading prompts."""

    taken: list[Offer | None]
    lengths: list[int]
    tokens: float = 0.0
    speed: float = 0.0


class DraftLength:
    """Chooses draft lengths and learns from their outcomes.

    ``steps`` learns what steps of the target cost by their rows, ``making[kind]`` what making
    guesses of a kind costs by their number. The target multiplies ``together`` rows at once.
    """

    def __init__(self, together: int = 1) -> None:
        self.steps = Times(together)
        self.making: dict[str, Times] = defaultdict(Times)
        self._sorts: dict[Sort, Record] = {}
        self._own: dict[int, dict[Sort, Record]] = defaultdict(dict)
        self._sure: dict[tuple[str, int], Record] = {}
        self._drafts: dict[str, deque[list[float]]] = defaultdict(lambda: deque(maxlen=DRAFTS))
        """Of kinds that tell, the chances of the latest drafts' guesses."""
        self._promises = Record(PRIOR_TRIALS, PRIOR_TRIALS)
        """What came of plans with guesses, of the tokens a second they promised."""
        self._met: set[int] = set()
        """Sequences for which something that tells was offered."""
        self._beside = Record(0.0, 0.0)
        """Seconds that steps which read prompts took beyond those that decoding alone takes, and
        the rows they had beyond it."""

    def chances(self, number: int, offer: Offer, least: float = 0.0) -> list[float]:
        """Chance of each guess of an offer for a sequence that it stays, and so those before it;
        up to the first whose chance is ``least`` or less."""
        found = []
        for chance in itertools.accumulate(self._rates(number, offer), operator.mul):
            found.append(chance)
            if chance <= least:
                break
        return found

    def _rates(self, number: int, offer: Offer) -> Iterator[float]:
        """Of each guess, the chance that it stays if those before it do."""
        if offer.chances:
            for place in range(offer.k):
                record = self._surely(offer, place)
                yield record.hits / record.trials
            return
        own = self._own[number]
        for sort in offer.sorts:
            common, mine = self._common(sort), own.get(sort)
            rate = common.hits / common.trials
            if mine is not None:
                rate = (mine.hits + OWN_TRIALS * rate) / (mine.trials + OWN_TRIALS)
            yield rate

    def likeliest(
        self, number: int, offers: Sequence[Offer], least: float = 0.0
    ) -> tuple[Offer | None, list[float]]:
        """The one of a sequence's offers of which most is expected, if there are any, and its
        ``chances``."""
        found = [(offer, self.chances(number, offer, least)) for offer in offers]
        if len(found) <= 1:
            return found[0] if found else (None, [])
        return max(found, key=lambda one: sum(one[1]))

    def choose(
        self, asked: Sequence[tuple[int, Sequence[Offer]]], rows: int, decoding: int
    ) -> Plan:
        """What to verify of the offers for each sequence, given with its number. Without any, the
        step has ``rows`` rows, and ``decoding`` sequences get a token each. The other rows are read
        anyway: what they take makes no token worth more time than in a step without them, and a
        guess costs as much as one of them."""
        untold = [(number, one) for number, some in asked for one in some if not one.chances]
        kinds = {offer.kind for _, offer in untold if not offer.tokens}
        least = NEGLIGIBLE * self.steps(decoding, decoding)
        costs = {kind: cost for kind in kinds if (cost := self._seconds(kind, 1)) > least}
        best = self._plan(asked, kinds, costs, rows, decoding)
        if costs:
            dearest = max(costs, key=costs.__getitem__)
            without = self._plan(asked, kinds - {dearest}, costs, rows, decoding)
            if best.speed < WORTH * without.speed:
                best = without
        taken = [offer for offer in best.taken if offer is not None and not offer.chances]
        for kind in kinds.difference(offer.kind for offer in taken):
            self.making[kind].fade()
        tried = {offer.sorts[0] for offer in taken}
        left = [(number, first) for number, one in untold if (first := one.sorts[0]) not in tried]
        for sort in {sort for _, sort in left}:
            self._common(sort).fade(sort.expected * PRIOR_TRIALS, PRIOR_TRIALS)
        for number, sort in left:
            if (own := self._own[number].get(sort)) is not None:
                own.fade(0.0, 0.0)
        return best

    def _plan(
        self,
        asked: Sequence[tuple[int, Sequence[Offer]]],
        kinds: Set[str],
        costly: Container[str],
        rows: int,
        decoding: int,
    ) -> Plan:
        """The best that can be made of guesses there are and offers of ``kinds``; making some of
        those is ``costly``."""
        tokens, alone = float(decoding), self.steps(decoding, decoding)
        least = CHEAP * CAUTION * self.steps.slope
        none = tokens / alone
        best = GAIN / self.kept * none
        best_of = [
            self.likeliest(
                number, [one for one in some if one.tokens or one.kind in kinds], best * least
            )
            for number, some in asked
        ]
        offers = [offer for offer, _ in best_of]
        guesses: list[tuple[float, int, int]] = []
        for i, (_, chances) in enumerate(best_of):
            guesses.extend((-chance, place, i) for place, chance in enumerate(chances))
        guesses.sort()  # those of one draft stay in their order, as chances fall along it
        made: Counter[str] = Counter()
        spent: dict[str, float] = {}
        verifying = self._verifying(rows, decoding)
        making, taken, expected = 0.0, 0, tokens
        for count, (negative, _, i) in enumerate(guesses, 1):
            if -negative < best * least:  # nor can any of the rest, likely as this or less
                break
            offer = offers[i]
            assert offer is not None
            if offer.kind in costly and not offer.tokens:
                made[offer.kind] += 1
                taking = self._seconds(offer.kind, made[offer.kind])
                making += taking - spent.get(offer.kind, 0.0)
                spent[offer.kind] = taking
            tokens -= negative
            speed = tokens / (alone + CAUTION * (making + verifying(count)))
            if speed > best:
                best, taken, expected = speed, count, tokens
        lengths = [0] * len(asked)
        for _, _, i in guesses[:taken]:
            lengths[i] += 1
        chosen = [offer if k else None for offer, k in zip(offers, lengths, strict=True)]
        return Plan(chosen, lengths, expected, best if taken else none)

    def _verifying(self, rows: int, decoding: int) -> Callable[[int], float]:
        """Seconds that so many guesses add to a step of ``rows``. Steps that decode alone do not
        tell it of those that read prompts: beside so many rows, none is multiplied for nothing
        while weights come from memory."""
        if rows > decoding and self._beside.trials:
            each = self._beside.hits / self._beside.trials
            return lambda count: count * each
        without = self.steps(rows, decoding)
        return lambda count: self.steps(rows + count, decoding) - without

    def _seconds(self, kind: str, count: int) -> float:
        """What making ``count`` guesses of a kind takes; nothing before it was first done."""
        times = self.making[kind]
        return times(count) if times.known else 0.0

    def worth_making(
        self, asked: Sequence[tuple[int, Sequence[Offer]]], plan: Plan, rows: int, decoding: int
    ) -> tuple[list[Offer | None], float]:
        """For each sequence the offer that tells, if its draft is worth making beside the ``plan``
        of the other offers, and the chance below which a guess is not worth verifying. As if the
        drafts turned out like the latest ones."""
        chosen: list[Offer | None] = [None] * len(asked)
        first = next((one for _, some in asked for one in some if one.tells), None)
        if first is None:
            return chosen, 0.0
        telling = [next((one for one in some if one.tells), None) for _, some in asked]
        given = sum(plan.lengths)
        verifying = self._verifying(rows, decoding)
        more = verifying(given + decoding) - verifying(given)
        price = min(1.0, CAUTION * more / decoding * plan.speed)
        drafts = self._drafts[first.kind]
        for (number, _), offer in zip(asked, telling, strict=True):
            if offer is not None and number not in self._met:
                self._met.add(number)
                for _ in range(min(len(drafts), -(-DRAFTS // decoding))):
                    drafts.popleft()
        usual = list(itertools.accumulate((one.expected for one in first.sorts), operator.mul))
        likely = [*drafts, *[usual] * (UNHEARD - len(drafts))]
        worth = [_worth(draft, price) for draft in likely]
        slots = sum(map(len, likely)) / len(likely)

        def seconds(count: int) -> float:
            return CAUTION * self._seconds(first.kind, round(count * slots))

        def gain(i: int) -> float:
            taken = plan.taken[i]
            if taken is None:
                return sum(worth) / len(worth)
            number, _ = asked[i]
            other = _worth(self.chances(number, taken), price)
            return sum(one - other for one in worth if one > other) / len(worth)

        tokens = plan.tokens
        few = sum(one is not None for one in telling)
        if tokens + few * sum(worth) / len(worth) > GAIN * (tokens + seconds(1) * plan.speed):
            gains = sorted(((gain(i), i) for i, one in enumerate(telling) if one), reverse=True)
            best, count, gained = GAIN, 0, 0.0
            for n, (one, _) in enumerate(gains, 1):
                gained += one
                speed = (tokens + gained) / (tokens + seconds(n) * plan.speed)
                if speed > best:
                    best, count = speed, n
            for _, i in gains[:count]:
                chosen[i] = telling[i]
        return chosen, price

    def told(self, number: int, offer: Offer) -> None:
        """Note what a draft that was made for a sequence tells."""
        self._drafts[offer.kind].append(self.chances(number, offer))

    @property
    def kept(self) -> float:
        """The part of what plans with guesses promise that comes true: of many choices the one that
        seems best is less good than it seems."""
        return min(1.0, self._promises.hits / self._promises.trials)

    def came(self, plan: Plan, speed: float) -> None:
        """Note how many tokens a second came of a ``plan`` for a step that only decoded."""
        if not any(plan.lengths):
            self._promises.fade(PRIOR_TRIALS, PRIOR_TRIALS)
        elif plan.speed:
            self._promises.add(min(speed / plan.speed, 2.0))

    def read(self, rows: int, decoding: int, seconds: float) -> None:
        """Note what a step of ``rows`` took that read prompts beside ``decoding`` sequences."""
        if not decoding or not self.steps.known:
            return
        rows, known = rows - decoding, self._beside
        more = max(0.0, seconds - self.steps(decoding, decoding))
        if known.trials:
            more = min(more, SLOW * rows * known.hits / known.trials)
        known.add(more, rows)

    def learn(self, number: int, offer: Offer, tried: int, kept: int) -> None:
        """Note that the first ``kept`` of ``tried`` guesses of an ``offer`` stayed."""
        if offer.chances:
            for place in range(min(kept + 1, tried)):
                self._surely(offer, place).add(place < kept)
            return
        own = self._own[number]
        for place, sort in enumerate(offer.sorts[: min(kept + 1, tried)]):
            self._common(sort).add(place < kept)
            own.setdefault(sort, Record(0.0, 0.0)).add(place < kept)

    def _common(self, sort: Sort) -> Record:
        found = self._sorts.get(sort)
        if found is None:
            found = self._sorts[sort] = Record(sort.expected * PRIOR_TRIALS, PRIOR_TRIALS)
        return found

    def _surely(self, offer: Offer, place: int) -> Record:
        """What became of guesses that a drafter was as sure of."""
        part = min(int(offer.chances[place] * SURENESS), SURENESS - 1)
        found = self._sure.get((offer.kind, part))
        if found is None:
            middle = (part + 0.5) / SURENESS
            found = self._sure[offer.kind, part] = Record(middle * PRIOR_TRIALS, PRIOR_TRIALS)
        return found

    def forget(self, number: int) -> None:
        """Drop a sequence's own record."""
        self._own.pop(number, None)
        self._met.discard(number)


def _worth(chances: Sequence[float], price: float) -> float:
    """Tokens that guesses of such ``DraftLength.chances`` give beyond their ``price`` each."""
    return sum(chance - price for chance in chances if chance > price)

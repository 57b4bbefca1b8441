"""Drafts for one engine step: who gets how many guesses, and what became of them."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

from narrows.contracts import Asked, CachePolicy, Draft, Drafter, LayerCache, ModelShape, Offer
from narrows.draft.learnt import BUCKET, MEMORY
from narrows.draft.length import DraftLength, Plan
from narrows.engine.scheduler import Work
from narrows.engine.sequence import Sequence

LONGEST_REST = 16
"""Steps that pass, at most, until drafts are thought of again, where none was worth its cost and
thinking costs more than it is likely to find."""
FOUND, LEAST_FOUND = 0.1, 0.01
"""What thinking is taken to find, to begin with and at least, where the last thought found nothing:
tokens a second, of those got without it."""

PLAIN_EVERY = 64
"""Steps with guesses, at most, until one passes without, at about as many sequences: what plain
steps take is not told by steps of many more rows, and all guesses are weighed against it."""

Offered = tuple[int, list[Offer]]
"""A sequence's number and what is offered for it."""


class Speculation:
    """One drafter beside one engine.

    Args:
        drafter: makes the guesses.
        fixed: verify that many guesses of each draft; None chooses what is fastest.
        together: rows that the target multiplies at once.

    ``tried[i]`` and ``kept[i]`` count the guesses verified at place ``i`` of their drafts, and
    those that stayed.
    """

    def __init__(self, drafter: Drafter, fixed: int | None = None, together: int = 1) -> None:
        self.drafter = drafter
        self.most = drafter.most if fixed is None else min(fixed, drafter.most)
        self.adapts = fixed is None
        self.length = DraftLength(together)
        self.tried = [0] * self.most
        self.kept = [0] * self.most
        self._offered: dict[int, Offer] = {}
        self._drafting = 0.0
        """Seconds that making the guesses of this step took."""
        self._latest_rest = self._rest = 0
        """Steps that the latest rest took, none if the latest thought began none; and those of it
        that are yet to pass without a thought."""
        self._found: dict[int, float] = defaultdict(lambda: FOUND)
        """See FOUND, learnt, for each step since that thought; as ``_plain``, since the fewer
        decode, the more is found."""
        self._idle = False
        """Whether the latest thought found nothing."""
        self._decoding = 0
        """Sequences that get a token in this step."""
        self._reads = False
        """Whether prompts are read in it, too."""
        self._plan: Plan | None = None
        """What was chosen for this step, if any thought was given to it."""
        self._tokens = 0
        """That this step has given so far."""
        self._plain: dict[int, _Plain] = defaultdict(_Plain)
        """By the number of sequences that decode, counted in powers of two."""
        self._made: set[str] = set()
        """Kinds of guesses made before: the first time is no measure, as nothing is at hand yet."""

    def drafts(self, work: list[Work]) -> list[Draft]:
        """A draft, often empty, for each item of ``work``; none reaches its request's limit."""
        self._offered, self._drafting = {}, 0.0
        self._plan, self._tokens = None, 0
        rows = sum(item.count for item in work)
        ready = [i for i, item in enumerate(work) if item.count == item.sequence.pending]
        self._decoding = len(ready)
        self._reads = rows > self._decoding
        if self._rest:
            self._rest -= 1
            return [Draft([])] * len(work)
        if self.adapts and not self._reads and self._plain[rows.bit_length()].due:
            return [Draft([])] * len(work)
        started = time.perf_counter()
        asked: dict[int, Asked] = {}
        for i in ready:
            sequence = work[i].sequence
            k = min(self.most, sequence.limit - len(sequence.tokens) - 1)
            if sequence.sealed and work[i].count == 1 and k > 0:
                asked[i] = Asked(sequence.number, sequence.tokens, k)
        offers = self.drafter.offer(list(asked.values()))
        offered = [(one.number, some) for one, some in zip(asked.values(), offers, strict=True)]
        if self.adapts:
            plan = self._choose(list(asked.values()), offered, rows, self._decoding)
            if asked:
                self._pause(plan, time.perf_counter() - started, rows)
            self._plan = plan if self.length.steps.known else None  # else it promised no seconds
        else:
            taken = [self.length.likeliest(number, some)[0] for number, some in offered]
            plan = Plan(taken, [offer.k if offer else 0 for offer in taken])
        wanted: dict[str, dict[int, Asked]] = defaultdict(dict)
        made: dict[int, Draft] = {}
        for (i, one), offer, k in zip(asked.items(), plan.taken, plan.lengths, strict=True):
            if offer is None:
                continue
            self._offered[one.number] = offer
            if offer.tokens:
                made[i] = Draft(list(offer.tokens[:k]))
            else:
                wanted[offer.kind][i] = Asked(one.number, one.tokens, k, offer.kind)
        for kind, some in wanted.items():
            started = time.perf_counter()
            drafts = self.drafter.propose(list(some.values()))
            made |= zip(some, drafts, strict=True)
            self._note(kind, drafts, started)
        none = Draft([])
        return [made.get(i, none) for i in range(len(work))]

    def _choose(self, asked: list[Asked], offered: list[Offered], rows: int, decoding: int) -> Plan:
        """What to verify; of the offers that tell, those drafts are made first that seem worth it,
        and the others are none."""
        others = [(number, [one for one in some if not one.tells]) for number, some in offered]
        plan = self.length.choose(others, rows, decoding)
        worth, price = self.length.worth_making(offered, plan, rows, decoding)
        some = [
            Asked(one.number, one.tokens, offer.k, offer.kind, price)
            for one, offer in zip(asked, worth, strict=True)
            if offer is not None
        ]
        if not some:
            return plan
        started = time.perf_counter()
        drafts = self.drafter.propose(some)
        told = {one.number: draft for one, draft in zip(some, drafts, strict=True) if draft.tokens}
        for (number, left), offer in zip(others, worth, strict=True):
            if offer is not None and number in told:
                draft = told[number]
                left.append(offer._replace(chances=draft.chances, tokens=draft.tokens))
                self.length.told(number, left[-1])
        plan = self.length.choose(others, rows, decoding)
        # Choosing once more is part of what such drafts cost.
        self._note(some[0].kind, drafts, started)
        return plan

    def _pause(self, plan: Plan, seconds: float, rows: int) -> None:
        """Rest, twice as long each time, if a step of ``rows`` that took so many to plan verifies
        nothing, and that is more than thinking at each step is likely to gain."""
        size = self._decoding.bit_length()
        if self._idle:
            plain = self._decoding / self.length.steps(self._decoding, self._decoding)
            gain = max(0.0, plan.speed / plain - 1)
            gain_a_step = gain / (self._latest_rest + 1)
            found = MEMORY * self._found[size] + (1 - MEMORY) * gain_a_step
            self._found[size] = max(found, LEAST_FOUND)
        self._idle = not any(plan.lengths)
        if not self._idle or seconds < self._found[size] * self.length.steps(rows, self._decoding):
            self._latest_rest = 0
            return
        self._latest_rest = self._rest = min(2 * self._latest_rest or 1, LONGEST_REST)

    def _note(self, kind: str, drafts: list[Draft], started: float) -> None:
        """Drafts of a kind have been made since ``started``."""
        seconds = time.perf_counter() - started
        self._drafting += seconds
        if kind in self._made:
            self.length.making[kind].observe(sum(len(one.tokens) for one in drafts), seconds)
        self._made.add(kind)

    def learn(self, sequence: Sequence, draft: Draft, kept: int) -> None:
        """Note how many guesses of a sequence's draft were right."""
        self._tokens += kept + 1
        for place in range(len(draft.tokens)):
            self.tried[place] += 1
            self.kept[place] += place < kept
        offer = self._offered.get(sequence.number)
        if offer is not None:
            self.length.learn(sequence.number, offer, len(draft.tokens), kept)

    def observe(self, rows: int, seconds: float) -> None:
        """Note what a step of ``rows`` tokens took, drafting included."""
        if self._reads:
            self.length.read(rows, self._decoding, seconds - self._drafting)
            return
        self.length.steps.observe(rows, seconds - self._drafting, self._decoding)
        if self._plan is not None:
            self.length.came(self._plan, self._tokens / seconds)
        known = (rows - 1) // BUCKET == (self._decoding - 1) // BUCKET
        self._plain[self._decoding.bit_length()].note(known)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self.drafter.forget(sequence.number)
        self.length.forget(sequence.number)


@dataclass(slots=True)
class _Plain:
    """Steps since one has shown what a step without guesses takes, and how many may pass: more and
    more, as what is known from few is soon outweighed."""

    since: int = 0
    most: int = 1

    @property
    def due(self) -> bool:
        return self.since >= self.most

    def note(self, known: bool) -> None:
        if self.due:
            self.most = min(2 * self.most, PLAIN_EVERY)
        self.since = 0 if known else self.since + 1


@dataclass(frozen=True)
class DraftingPolicy:
    """A cache policy whose estimates count what a drafter holds, too."""

    policy: CachePolicy
    drafter: Drafter

    @property
    def spec(self) -> str:
        """See CachePolicy: the target's."""
        return self.policy.spec

    @property
    def rehearses(self) -> bool:
        """See CachePolicy: the target's."""
        return self.policy.rehearses

    def holding(self, tokens: int) -> DraftingPolicy:
        """See CachePolicy."""
        return DraftingPolicy(self.policy.holding(tokens), self.drafter)

    def build(self, shape: ModelShape) -> list[LayerCache]:
        """See CachePolicy: the target's."""
        return self.policy.build(shape)

    def estimate(self, shape: ModelShape, tokens: int, prompt: int | None = None) -> int:
        """See CachePolicy."""
        return self.policy.estimate(shape, tokens, prompt) + self.drafter.estimate(tokens)

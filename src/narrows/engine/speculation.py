"""Drafts for one engine step: who gets how many guesses, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from narrows.contracts import Asked, CachePolicy, Draft, Drafter, LayerCache, ModelShape, Offer
from narrows.draft.length import DraftLength
from narrows.engine.scheduler import Work
from narrows.engine.sequence import Sequence


class Speculation:
    """One drafter beside one engine.

    Args:
        drafter: makes the guesses.
        fixed: verify that many guesses of each draft; None chooses what is fastest.

    ``tried[i]`` and ``kept[i]`` count the guesses verified at place ``i`` of their drafts, and
    those that stayed.
    """

    def __init__(self, drafter: Drafter, fixed: int | None = None) -> None:
        self.drafter = drafter
        self.most = drafter.most if fixed is None else min(fixed, drafter.most)
        self.adapts = fixed is None
        self.length = DraftLength()
        self.tried = [0] * self.most
        self.kept = [0] * self.most
        self._offered: dict[int, Offer] = {}

    def drafts(self, work: list[Work], limit: Callable[[Sequence], int]) -> list[Draft]:
        """A draft, often empty, for each item of ``work``; none reaches the request's ``limit``."""
        asked: dict[int, Asked] = {}
        for i, item in enumerate(work):
            sequence = item.sequence
            k = min(self.most, limit(sequence) - len(sequence.tokens) - 1)
            if sequence.sealed and sequence.pending == 1 and k > 0:
                asked[i] = Asked(sequence.number, sequence.tokens, k)
        rows = sum(item.count for item in work)
        decoding = sum(item.count == item.sequence.pending for item in work)
        self._offered = {}
        for one, offers in zip(
            asked.values(), self.drafter.offer(list(asked.values())), strict=True
        ):
            if offers:
                likeliest = max(offers, key=lambda o: self.length.expected(one.number, o))
                self._offered[one.number] = likeliest
        lengths = self._lengths(rows, decoding)
        wanted = {
            i: Asked(one.number, one.tokens, lengths[one.number], self._offered[one.number].kind)
            for i, one in asked.items()
            if lengths.get(one.number)
        }
        made = dict(zip(wanted, self.drafter.propose(list(wanted.values())), strict=True))
        return [made.get(i, Draft([])) for i in range(len(work))]

    def _lengths(self, rows: int, decoding: int) -> dict[int, int]:
        """Guesses to verify by sequence with an offer."""
        if not self.adapts:
            return {number: offer.k for number, offer in self._offered.items()}
        chosen = self.length.choose(list(self._offered.items()), rows, decoding)
        return dict(zip(self._offered, chosen, strict=True))

    def learn(self, sequence: Sequence, draft: Draft, kept: int) -> None:
        """Note how many guesses of a sequence's draft were right."""
        for place in range(len(draft.tokens)):
            self.tried[place] += 1
            self.kept[place] += place < kept
        offer = self._offered.get(sequence.number)
        if offer is not None:
            self.length.learn(sequence.number, offer.kind, len(draft.tokens), kept)

    def observe(self, rows: int, seconds: float) -> None:
        """Note what a step of ``rows`` tokens took, drafting included."""
        self.length.times.observe(rows, seconds)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self.drafter.forget(sequence.number)
        self.length.forget(sequence.number)


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

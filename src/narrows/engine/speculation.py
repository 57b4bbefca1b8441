"""Drafts for one engine step: who gets how many guesses, and what became of them."""

from __future__ import annotations

from collections.abc import Callable

from narrows.contracts import Draft, Drafter
from narrows.draft.length import DraftLength
from narrows.engine.scheduler import Work
from narrows.engine.sequence import Sequence


class Speculation:
    """One drafter beside one engine.

    Args:
        drafter: makes the guesses.
        fixed: verify that many guesses of each draft; None chooses what is fastest.
    """

    def __init__(self, drafter: Drafter, fixed: int | None = None) -> None:
        self.drafter = drafter
        self.most = drafter.most if fixed is None else min(fixed, drafter.most)
        self.adapts = fixed is None
        self.length = DraftLength()
        self._offered: dict[int, Draft] = {}

    def drafts(self, work: list[Work], limit: Callable[[Sequence], int]) -> list[Draft]:
        """A draft, often empty, for each item of ``work``; none reaches the request's ``limit``."""
        made = [Draft([])] * len(work)
        asked = []
        for i, item in enumerate(work):
            sequence = item.sequence
            room = limit(sequence) - len(sequence.tokens) - 1
            if sequence.sealed and sequence.pending == 1 and room > 0:
                k = min(self.most, room)
                draft = self.drafter.propose(sequence.number, sequence.tokens, k)
                if draft.tokens:
                    asked.append((i, draft))
        self._offered = {work[i].sequence.number: draft for i, draft in asked}
        if not asked:
            return made
        if not self.adapts:
            for i, draft in asked:
                made[i] = draft
            return made
        rows = sum(item.count for item in work)
        decoding = sum(item.count == item.sequence.pending for item in work)
        offers = [(work[i].sequence.number, draft) for i, draft in asked]
        lengths = self.length.choose(offers, rows, decoding)
        for (i, draft), k in zip(asked, lengths, strict=True):
            probabilities = draft.probabilities
            if probabilities is not None:
                probabilities = probabilities[:k]
            made[i] = Draft(draft.tokens[:k], probabilities, draft.kind)
        return made

    def learn(self, sequence: Sequence, draft: Draft, kept: int) -> None:
        """Note how many guesses of a sequence's draft were right."""
        offered = self._offered.get(sequence.number)
        if offered is not None:
            self.length.learn(sequence.number, offered, len(draft.tokens), kept)

    def observe(self, rows: int, seconds: float) -> None:
        """Note what a step of ``rows`` tokens took, drafting included."""
        self.length.times.observe(rows, seconds)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended or gave its caches back."""
        self.drafter.forget(sequence.number)
        self.length.forget(sequence.number)

"""Drafts for one engine step: who gets how many guesses, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from narrows.cache.dense import DensePolicy
from narrows.contracts import Draft, Drafter, FlatBatch
from narrows.draft.length import DraftLength, StepTime
from narrows.engine.scheduler import Work
from narrows.engine.sequence import Sequence
from narrows.model.flat import FlatModel

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of the steps that are timed; the draft lengths of a step are chosen from those times."""
KEYS = 2048
"""Keys behind the rows of the step that tells what a key costs."""
TRIALS = 3


class Speculation:
    """One drafter beside one engine.

    Args:
        drafter: makes the guesses.
        model: verifies them; timed when the first guess is made.
        fixed: verify that many guesses of each draft; None chooses what is fastest.
    """

    def __init__(self, drafter: Drafter, model: FlatModel, fixed: int | None = None) -> None:
        self.drafter = drafter
        self.model = model
        self.most = drafter.most if fixed is None else min(fixed, drafter.most)
        self.adapts = fixed is None
        self.length: DraftLength | None = None
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
        if self.length is None:
            self.length = DraftLength(step_time(self.model))
        rows = sum(item.count for item in work)
        keys = sum(item.count * len(item.sequence.tokens) for item in work)
        sequences = [work[i].sequence for i, _ in asked]
        offers = [(s.number, d, len(s.tokens)) for s, (_, d) in zip(sequences, asked, strict=True)]
        for (i, draft), k in zip(asked, self.length.choose(offers, rows, keys), strict=True):
            probabilities = draft.probabilities
            if probabilities is not None:
                probabilities = probabilities[:k]
            made[i] = Draft(draft.tokens[:k], probabilities, draft.kind)
        return made

    def learn(self, sequence: Sequence, draft: Draft, kept: int) -> None:
        """Note how many guesses of a sequence's draft were right."""
        offered = self._offered.get(sequence.number)
        if offered is not None and self.length is not None:
            self.length.learn(sequence.number, offered, len(draft.tokens), kept)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended or gave its caches back."""
        self.drafter.forget(sequence.number)
        if self.length is not None:
            self.length.forget(sequence.number)


def step_time(model: FlatModel) -> StepTime:
    """Time steps of ROWS tokens, and one behind KEYS more, on ``model`` with a dense cache: the
    least of TRIALS each. Takes about as long as twenty decoding steps of small batches."""
    rows = tuple(r for r in ROWS if r < model.shape.max_tokens)
    seconds = [_seconds(model, r, 0) for r in rows]
    for i in range(1, len(rows)):  # a step of more rows is never quicker
        seconds[i] = max(seconds[i], seconds[i - 1])
    keys = min(KEYS, model.shape.max_tokens - rows[-1])
    few = rows[min(3, len(rows) - 1)]
    added = _seconds(model, few, keys) - seconds[rows.index(few)]
    return StepTime(rows, tuple(seconds), max(0.0, added) / (few * keys))


def _seconds(model: FlatModel, rows: int, keys: int) -> float:
    device = model.shape.device
    caches = DensePolicy().build(model.shape)

    def read(count: int) -> None:
        place = caches[0].length
        ids = torch.zeros(count, dtype=torch.long, device=device)
        positions = torch.arange(place, place + count, device=device)
        model.logits(model.hidden(ids, positions, FlatBatch([(0, count)], [caches])))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if keys:
        read(keys)
    taken = []
    for _ in range(TRIALS + 1):  # the first also warms up
        started = time.perf_counter()
        read(rows)
        taken.append(time.perf_counter() - started)
        for cache in caches:
            cache.rollback(rows)
    return min(taken[1:])

"""One step's forward pass: packs the planned tokens flat, runs the model, gives logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from narrows.contracts import Draft, Drafter, FlatBatch
from narrows.engine.scheduler import Work
from narrows.model.flat import FlatModel


def forward(
    model: FlatModel, work: list[Work], drafts: Sequence[Draft], drafter: Drafter | None = None
) -> tuple[list[int], list[int], Tensor]:
    """Read every planned token, and behind a sequence's newest one its draft; the drafter sees
    all of it. Returns which of ``work`` had their newest token read, its row in the step, and the
    float32 logits of what follows it and each guess: those of the first such sequence, then of
    the next, ``[n, vocab_size]``."""
    ids: list[int] = []
    positions: list[int] = []
    spans = []
    caches = []
    ready = []
    newest: list[int] = []
    rows: list[int] = []
    for number, (item, draft) in enumerate(zip(work, drafts, strict=True)):
        sequence, start = item.sequence, item.sequence.computed
        assert sequence.caches is not None
        read = [*sequence.tokens[start : start + item.count], *draft.tokens]
        spans.append((len(ids), len(ids) + len(read)))
        ids.extend(read)
        positions.extend(range(start, start + len(read)))
        caches.append(sequence.caches)
        if start + item.count == len(sequence.tokens):
            ready.append(number)
            newest.append(len(ids) - len(draft.tokens) - 1)
            rows.extend(range(newest[-1], len(ids)))
    device, batch = model.shape.device, FlatBatch(spans, caches)
    tokens, places = (torch.tensor(x, device=device) for x in (ids, positions))
    if drafter is not None and drafter.taps:
        hidden, taps = model.hidden_and_taps(tokens, places, batch, drafter.taps)
        drafter.read(taps, places, batch)
    else:
        hidden = model.hidden(tokens, places, batch)
    return ready, newest, model.logits(hidden[rows])

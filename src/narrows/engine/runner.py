"""One step's forward pass: packs the planned tokens flat, runs the model, gives logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from narrows.contracts import Draft, FlatBatch
from narrows.engine.scheduler import Work
from narrows.model.flat import FlatModel


def forward(
    model: FlatModel, work: list[Work], drafts: Sequence[Draft]
) -> tuple[list[int], Tensor]:
    """Read every planned token, and behind a sequence's newest one its draft. Returns which of
    ``work`` had their newest token read, and the float32 logits of what follows it and each
    guess: rows of the first such sequence, then of the next, ``[n, vocab_size]``."""
    ids: list[int] = []
    positions: list[int] = []
    spans = []
    caches = []
    ready = []
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
            rows.extend(range(len(ids) - len(draft.tokens) - 1, len(ids)))
    device = model.shape.device
    hidden = model.hidden(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        FlatBatch(spans, caches),
    )
    return ready, model.logits(hidden[rows])

"""One step's forward pass: packs the planned tokens flat, runs the model, gives logits."""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.contracts import FlatBatch
from narrows.engine.scheduler import Work
from narrows.engine.sequence import Sequence
from narrows.model.flat import FlatModel


def forward(model: FlatModel, work: list[Work]) -> tuple[list[Sequence], Tensor]:
    """Read every planned token. Returns the sequences whose last token was read and the
    float32 logits ``[len(sequences), vocab_size]`` of what follows it."""
    ids: list[int] = []
    positions: list[int] = []
    spans = []
    caches = []
    ready = []
    last_rows = []
    for item in work:
        sequence, start = item.sequence, item.sequence.computed
        assert sequence.caches is not None
        stop = start + item.count
        spans.append((len(ids), len(ids) + item.count))
        ids.extend(sequence.tokens[start:stop])
        positions.extend(range(start, stop))
        caches.append(sequence.caches)
        if stop == len(sequence.tokens):
            ready.append(sequence)
            last_rows.append(len(ids) - 1)
    device = model.shape.device
    hidden = model.hidden(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        FlatBatch(spans, caches),
    )
    return ready, model.logits(hidden[last_rows])

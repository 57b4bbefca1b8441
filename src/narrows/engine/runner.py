"""One step's forward pass: packs the planned tokens flat and runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.contracts import Draft, FlatBatch, Span
from narrows.engine.scheduler import Work
from narrows.model.flat import FlatModel


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass made.

    ``spans`` are the rows of each item of work, guesses included. ``ready`` numbers the items
    whose newest token was read; ``states`` ``[n, hidden_size]`` are of it and each guess: those of
    the first such item, then of the next. ``taps`` as ``FlatModel.hidden_and_taps`` gives them, if
    any were asked for.
    """

    spans: list[Span]
    ready: list[int]
    states: Tensor
    taps: Tensor | None


def forward(
    model: FlatModel, work: list[Work], drafts: Sequence[Draft], taps: Sequence[int] = ()
) -> Pass:
    """Read every planned token, and behind a sequence's newest one its draft."""
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
    device, batch = model.shape.device, FlatBatch(spans, caches)
    tokens, places = (torch.tensor(x, device=device) for x in (ids, positions))
    seen = None
    if taps:
        hidden, seen = model.hidden_and_taps(tokens, places, batch, taps)
    else:
        hidden = model.hidden(tokens, places, batch)
    last = hidden if len(rows) == len(ids) else hidden[rows]
    return Pass(spans, ready, last, seen)

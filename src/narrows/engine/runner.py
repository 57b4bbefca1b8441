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

    ``ready`` numbers the items of work whose newest token was read; ``states`` ``[n, hidden_size]``
    are of it and each guess: those of the first such item, then of the next. ``taps`` are as
    ``FlatModel.hidden_and_taps`` gives them of what was to be seen, if anything was, and ``seen``
    the rows of each item among them, guesses included.
    """

    ready: list[int]
    states: Tensor
    taps: Tensor | None
    seen: list[Span]


def forward(
    model: FlatModel,
    work: list[Work],
    drafts: Sequence[Draft],
    taps: Sequence[int] = (),
    wanted: Sequence[int] = (),
) -> Pass:
    """Read every planned token, and behind a sequence's newest one its draft. ``taps`` are of each
    item's tokens from number ``wanted`` on."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
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
    seen: list[Span] = []
    looked: list[int] = []
    for first, item, (row, stop) in zip(wanted, work, spans, strict=bool(wanted)):
        skipped = first - item.sequence.computed
        some = range(row + skipped, stop) if skipped < item.count else range(0)
        seen.append((len(looked), len(looked) + len(some)))
        looked.extend(some)
    device, batch = model.shape.device, FlatBatch(spans, caches)
    tokens, places = (torch.tensor(x, device=device) for x in (ids, positions))
    states = None
    if looked:
        only = None if len(looked) == len(ids) else torch.tensor(looked, device=device)
        hidden, states = model.hidden_and_taps(tokens, places, batch, taps, only)
    else:
        hidden = model.hidden(tokens, places, batch)
    last = hidden if len(rows) == len(ids) else hidden[rows]
    return Pass(ready, last, states, seen)

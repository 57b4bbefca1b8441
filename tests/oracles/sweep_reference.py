"""A sweep said plainly: for every segment one forward pass over the whole text so far, in which
an attention mask hides what was deleted, with all attention weights returned."""

from __future__ import annotations

import torch


def visible(kept, start, stop):
    """Which of the first ``stop`` tokens the rows ``[start, stop)`` see: bool ``[stop, stop]``."""
    seen = torch.tril(torch.ones(stop, stop, dtype=torch.bool))
    gone = [t for t in range(start) if t not in kept]
    seen[start:, gone] = False
    return seen


def compress(stock, ids, forced, budget, size, fuse):
    """Positions kept and scores, for units of one token; ``fuse(surprisal, attention)`` makes a
    segment's scores. Rows of earlier segments are masked as they were when they were read."""
    free, total = budget - len(forced), len(ids) - len(forced)
    kept, scores, seen_free, spent = [], [], 0, 0
    n = len(ids)
    mask = torch.full((n, n), float("-inf"))
    for start in range(0, n, size):
        stop = min(n, start + size)
        mask[start:stop, :stop].masked_fill_(visible(set(kept), start, stop)[start:], 0.0)
        with torch.no_grad():
            out = stock(
                input_ids=torch.tensor([ids[:stop]]),
                attention_mask=mask[None, None, :stop, :stop],
                output_attentions=True,
            )
        log_p = torch.log_softmax(out.logits[0].double(), dim=-1)
        nats = [-log_p[t - 1, ids[t]].item() if t else 0.0 for t in range(start, stop)]
        weights = torch.stack([a[0] for a in out.attentions]).double()  # [layers, heads, n, n]
        received = weights[:, :, start:stop].sum(2).mean((0, 1))[start:stop].tolist()
        segment = fuse(nats, received)
        scores += segment
        open_ = [t for t in range(start, stop) if t not in forced]
        seen_free += len(open_)
        share = free * seen_free // total - spent
        best = sorted(open_, key=lambda t: (-scores[t], t))[:share]
        spent += len(best)
        kept += sorted([*best, *(t for t in range(start, stop) if t in forced)])
    return kept, scores

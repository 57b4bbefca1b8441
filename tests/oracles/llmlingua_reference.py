"""Iterative token compression, said plainly: no caches, one full forward pass a segment."""

from __future__ import annotations

import torch


def surprisal_after(stock, prefix, segment):
    """-ln p of each token of ``segment`` after ``prefix``; a very first token as the largest."""
    ids = torch.tensor([prefix + segment])
    with torch.no_grad():
        log_p = torch.log_softmax(stock(input_ids=ids).logits[0].double(), dim=-1)
    nats = [
        -log_p[t - 1, ids[0, t]].item() if t else None for t in range(len(prefix), ids.shape[1])
    ]
    if nats[0] is None:
        nats[0] = max(nats[1:])
    return nats


def compress(stock, ids, alive, forced, budget, size):
    """Positions kept and the score of every living token, for units of one token.

    ``alive`` and ``forced`` are positions; segments of ``size`` living tokens each keep their
    share of ``budget`` less the forced tokens.
    """
    free = budget - len(forced)
    total = len(set(alive) - set(forced))
    kept, scores, seen, spent = [], {}, 0, 0
    for start in range(0, len(alive), size):
        segment = alive[start : start + size]
        nats = surprisal_after(stock, [ids[t] for t in kept], [ids[t] for t in segment])
        scores.update(zip(segment, nats, strict=True))
        open_ = [t for t in segment if t not in forced]
        seen += len(open_)
        share = free * seen // total - spent
        best = sorted(open_, key=lambda t: (-scores[t], t))[:share]
        spent += len(best)
        kept += sorted([*best, *(t for t in segment if t in forced)])
    return kept, scores

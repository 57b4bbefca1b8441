"""DAC by the book, for single-token units: lists, loops and full attention maps."""

from __future__ import annotations

import torch

from oracles import score_reference


@torch.no_grad()
def stage_scores(stock, ids, alpha, fusion):
    """Fused scores of all tokens but the first."""
    logits = stock(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    shock = [-logits[t - 1, ids[t]].item() for t in range(1, len(ids))]
    heed = score_reference.received(stock, ids)[1:].tolist()
    if fusion == "multiplicative":
        return [i * a for i, a in zip(shock, heed, strict=True)]
    return [(1 - alpha) * i + alpha * a for i, a in zip(scaled(shock), scaled(heed), strict=True)]


def scaled(values):
    low, high = min(values), max(values)
    return [(x - low) / (high - low) if high - low > 1e-8 else 0.0 for x in values]


def keep(stock, ids, targets, alpha=0.8, fusion="additive"):
    """Indices kept when the tokens but the first shrink to each of ``targets`` in turn."""
    kept = list(range(len(ids)))
    for target in targets:
        scores = stage_scores(stock, [ids[i] for i in kept], alpha, fusion)
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:target]
        kept = [kept[0], *(kept[i + 1] for i in sorted(best))]
    return kept

"""Token scores from stock transformers models, by the definitions and without any saving."""

from __future__ import annotations

import torch


@torch.no_grad()
def surprisal(stock, ids):
    """-ln p of every token, each from its own pass over what precedes it; 0 for the first."""
    out = [0.0]
    for t in range(1, len(ids)):
        logits = stock(torch.tensor([ids[:t]])).logits[0, -1]
        out.append(-torch.log_softmax(logits.double(), -1)[ids[t]].item())
    return out


@torch.no_grad()
def received(stock, ids):
    """Column sums of the full attention maps, mean over all layers and heads. ``[n]``"""
    maps = stock(torch.tensor([ids]), output_attentions=True).attentions
    return torch.stack(maps).double().sum(-2).mean((0, 1, 2)).numpy()


def harmonic(n):
    """Column sums of uniform causal attention: 1/j + ... + 1/n for the j-th token."""
    return [sum(1.0 / i for i in range(j, n + 1)) for j in range(1, n + 1)]

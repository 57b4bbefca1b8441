"""KIVI said plainly: one sequence, one layer, Python lists of groups, tokens one by one.

Keys ``[heads, tokens, dim]`` are quantised per channel in blocks of ``residual`` tokens, values per
token as they leave a window of ``residual`` tokens.
"""

from __future__ import annotations

import torch


def code(x, bits):
    """Codes, scale and zero of one group, a list of floats, in float32 arithmetic."""
    x = torch.tensor(x, dtype=torch.float32)
    low, high = x.min(), x.max()
    scale = (high - low) / (2**bits - 1)
    if scale == 0:
        return [0] * len(x), 0.0, low.item()
    codes = torch.round(torch.clamp((x - low) / scale, 0, 2**bits - 1))
    return codes.int().tolist(), scale.item(), low.item()


def half(x):
    return torch.tensor(x, dtype=torch.float32).half().float().item()


def keys(k, tokens, residual, group, bits):
    """What is left of keys after prefill and decoding to ``tokens`` tokens: float32, the newest
    ``tokens mod residual`` unchanged."""
    out = k[:, :tokens].float().clone()
    for h in range(k.shape[0]):
        for start in range(0, tokens // residual * residual, group):
            for d in range(k.shape[2]):
                codes, scale, zero = code(k[h, start : start + group, d].float().tolist(), bits)
                for i, c in enumerate(codes):
                    out[h, start + i, d] = c * half(scale) + half(zero)
    return out


def values(v, tokens, residual, group, bits):
    """The same of values: all but the newest ``residual`` tokens."""
    out = v[:, :tokens].float().clone()
    for h in range(v.shape[0]):
        for t in range(max(0, tokens - residual)):
            for start in range(0, v.shape[2], group):
                codes, scale, zero = code(v[h, t, start : start + group].float().tolist(), bits)
                for i, c in enumerate(codes):
                    out[h, t, start + i] = c * half(scale) + half(zero)
    return out

"""Continuous integrate-and-fire: from a row of frames to a row of tokens.

After Dong and Xu (arXiv 1905.11235) as used by CLSR (arXiv 2511.09282). Frames pour their weight
into a bucket of a fixed size; each time it is full, the weighted sum of what was poured is one
token's embedding, and the overflow goes on to the next. Here as one closed form (sheet section
3.2): with the running sum ``c`` of the weights, token ``n`` takes from frame ``t`` what lies of
``[c[t-1], c[t]]`` in ``[n, n + 1]`` buckets. A frame may so fill several buckets, everything is one
batched product, and gradients are the loop's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Tail = Literal["drop", "zero_frame", "rescale"]
FILLED: dict[Tail, float] = {"drop": 0.0, "zero_frame": 0.45, "rescale": 0.5}
"""What the last bucket is given for free when it is decided whether it fires."""
ROUNDING = 1e-5
"""Of a bucket: what may be missing in a full one, since weights are rounded."""


class Fired(NamedTuple):
    """What ``fire`` gives: ``shares`` ``[B, N, T]``, how much of each frame each token takes, zero
    behind an item's last token; ``counts`` int64 ``[B]``, its tokens; ``totals`` ``[B]``, the sum
    of its ``weights`` ``[B, T]`` as they were given, 0 in padding, for the length loss."""

    shares: Tensor
    counts: Tensor
    totals: Tensor
    weights: Tensor


def fire(
    weights: Tensor,
    mask: Tensor,
    targets: Tensor | None = None,
    *,
    bucket: float = 1.0,
    tail: Tail = "zero_frame",
) -> Fired:
    """Let weighted frames fire tokens.

    Args:
        weights: ``[B, T]``, none negative.
        mask: bool ``[B, T]``, the frames that are not padding; what stands elsewhere is not read.
        targets: int64 ``[B]``, how many tokens fire; the weights are scaled to that. None fires
            as many as the weights fill.
        bucket: weight of a token.
        tail: what becomes of a last bucket that is not full, without ``targets``. "drop" lets it
            go, "zero_frame" lets it fire as it is from 0.55 on (as if a frame of zeros and weight
            0.45 followed), "rescale" fills it up from 0.5 on.

    Sums are made in float64, since where a token ends depends on all weights before it; the result
    is in the dtype of ``weights``.
    """
    weights = weights.masked_fill(~mask, 0.0)
    poured = weights.double()
    totals = poured.sum(1)
    if targets is None:
        counts = (totals / bucket + FILLED[tail] + ROUNDING).floor().long()
    else:
        counts = targets
        # Without any weight nothing says where the tokens are: each frame then weighs the same.
        poured = torch.where((totals > 0)[:, None], poured, mask.double())
        poured = poured * (targets * bucket / poured.sum(1).clamp(min=1e-300))[:, None]
    ends = poured.cumsum(1)
    starts = ends - poured
    tokens = torch.arange(int(counts.max()) if len(counts) else 0, device=weights.device)
    low = (tokens * bucket)[None, :, None]
    shares = torch.minimum(ends[:, None], low + bucket) - torch.maximum(starts[:, None], low)
    shares = shares.clamp(min=0.0) * (tokens < counts[:, None])[:, :, None]
    if targets is None and tail == "rescale":
        filled = shares.sum(2, keepdim=True)
        shares = torch.where(filled > 0, shares * (bucket / filled.clamp(min=1e-300)), shares)
    return Fired(shares.to(weights.dtype), counts, totals.to(weights.dtype), weights)


def spans(shares: Tensor, edge: float = 0.0) -> Tensor:
    """First frame of each token and the one behind its last, int64 ``[B, N, 2]``; both 0 for a
    token that took nothing. Neighbours share the frame in which one ends and the next begins.
    ``edge`` of what a token took is not looked at, before and behind: a pause gives the word
    after it next to nothing, frame by frame."""
    taken = shares.double().cumsum(2)
    total = taken[:, :, -1:]
    first = (taken <= edge * total).sum(2)
    last = (taken < (1 - edge) * total).sum(2) + 1
    return torch.stack([first, last], 2) * (total > 0)

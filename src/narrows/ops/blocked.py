"""Causal attention that can also say how much attention every token received: by a kernel, or by
blocks of query rows, two products and a softmax each.

The received attention of token ``j`` is the column sum of the softmax weights over query heads
and rows. The memory held is heads x rows x keys, never tokens x tokens; keys past a block's last
row, or left of its window, are not multiplied at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ops import flash
from narrows.ops.native import softmax_mass_


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mass: Tensor | None = None,
    window: int | None = None,
    block_rows: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attend, and add each token's received attention to ``mass`` if there is one.

    Args:
        q: queries ``[n, heads, d]`` of the newest tokens; consecutive heads share a key head.
        k: keys ``[m, kv_heads, d]``, ``m >= n``, the last ``n`` of the queries' tokens.
        v: values ``[m, kv_heads, dv]``.
        scale: factor on the scores before the softmax.
        mass: float32 ``[m]``, or ``[heads, m]`` to tell query heads apart, added to in place; one
            call adds ``heads * n`` in total.
        window: tokens a query may see, its own included; None for all before it.
        block_rows: query rows scored at once.
        dtype: what scores are rounded to and products are made of; softmax and sums are float32.

    Returns:
        ``[n, heads, dv]`` in q's dtype.
    """
    n, heads, d = q.shape
    m, groups, dv = *k.shape[:2], v.shape[2]
    past = m - n
    folded = heads // groups
    if flash.supported(q, dtype):
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        return flash.flash_attention(q, keys, values, scale, window, mass).to(q.dtype)
    if mass is not None and mass.dim() == 2:
        outs = []
        for head, paid in enumerate(mass):
            keys, values = (x[:, head // folded, None] for x in (k, v))
            one = q[:, head, None]
            outs.append(
                blocked_attention(one, keys, values, scale, paid, window, block_rows, dtype)
            )
        return torch.cat(outs, 1)
    # Rows of a key head's query heads lie next to each other, so that one product serves them all.
    queries = (q.float() * scale).to(dtype).view(n, groups, folded, d).transpose(0, 1).contiguous()
    keys = k.to(dtype).permute(1, 2, 0).contiguous()
    values = v.to(dtype).transpose(0, 1).contiguous()
    out = q.new_empty((n, groups, folded, dv))
    reach = m if window is None else min(m, window - 1 + block_rows)
    scratch = queries.new_empty(heads * min(block_rows, n) * reach)
    for a in range(0, n, block_rows):
        b = min(n, a + block_rows)
        first, stop = past + a, past + b
        start = 0 if window is None else max(0, first - window + 1)
        rows, seen = (b - a) * folded, stop - start
        scores = scratch[: groups * rows * seen].view(groups, rows, seen)
        torch.bmm(queries[:, a:b].reshape(groups, rows, d), keys[:, :, start:stop], out=scores)
        received = None if mass is None else mass[start:stop]
        softmax_mass_(scores, folded, first - start, window, received)
        mixed = torch.bmm(scores, values[:, start:stop])
        out[a:b] = mixed.view(groups, b - a, folded, dv).transpose(0, 1)
    return out.view(n, heads, dv)

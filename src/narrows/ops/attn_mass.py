"""Causal attention that also says how much attention every token received.

The received attention of token ``j`` is the column sum of the softmax weights over query heads
and rows. Query rows are taken in blocks, so the memory held is heads x rows x keys, never
tokens x tokens; keys past a block's last row, or left of its window, are not multiplied at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ops.attention import visible


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mass: Tensor,
    window: int | None = None,
    block_rows: int = 64,
) -> Tensor:
    """Attend, and add each token's received attention to ``mass``.

    Args:
        q: queries ``[n, heads, d]``; consecutive heads share a key head.
        k: keys ``[n, kv_heads, d]`` of the same ``n`` tokens.
        v: values ``[n, kv_heads, dv]``.
        scale: factor on the scores before the softmax.
        mass: float32 ``[n]``, added to in place; one call adds ``heads * n`` in total.
        window: tokens a query may see, its own included; None for all before it.
        block_rows: query rows scored at once.

    Returns:
        ``[n, heads, dv]`` in q's dtype. Scores, weights and sums are float32 whatever it is.
    """
    n, heads, d = q.shape
    groups, dv = k.shape[1], v.shape[2]
    folded = heads // groups
    # Rows of a key head's query heads lie next to each other, so that one product serves them all.
    queries = (q.float() * scale).view(n, groups, folded, d).transpose(0, 1).contiguous()
    keys = k.float().permute(1, 2, 0).contiguous()
    values = v.float().transpose(0, 1).contiguous()
    out = q.new_empty((n, groups, folded, dv))
    reach = n if window is None else min(n, window - 1 + block_rows)
    scratch = queries.new_empty(heads * min(block_rows, n) * reach)
    for a in range(0, n, block_rows):
        b = min(n, a + block_rows)
        start = 0 if window is None else max(0, a - window + 1)
        rows, seen = (b - a) * folded, b - start
        scores = scratch[: groups * rows * seen].view(groups, rows, seen)
        torch.bmm(queries[:, a:b].reshape(groups, rows, d), keys[:, :, start:b], out=scores)
        edge = a if window is None else start  # without a window only the diagonal needs a mask
        hidden = ~visible(a - edge, b - a, b - edge, window, q.device)
        scores.view(groups, b - a, folded, seen)[..., edge - start :].masked_fill_(
            hidden[:, None, :], float("-inf")
        )
        torch.softmax(scores, -1, out=scores)
        mass[start:b] += scores.view(-1, seen).sum(0)
        mixed = torch.bmm(scores, values[:, start:b])
        out[a:b] = mixed.view(groups, b - a, folded, dv).transpose(0, 1)
    return out.view(n, heads, dv)

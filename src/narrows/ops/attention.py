"""Causal attention of the newest tokens of one sequence over its stored keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from narrows.ops import flash

BLOCK = 256
"""Query rows scored at once when a mask is needed; the mask is at most BLOCK x keys."""


def visible(first: int, rows: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each of ``rows`` queries, standing at key index ``first`` on, may see:
    boolean ``[rows, keys]``."""
    query = torch.arange(first, first + rows, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention of ``q`` ``[n, heads, d]``, the newest ``n`` of ``m`` tokens.

    ``k`` ``[kv_heads, m, d]`` and ``v`` ``[kv_heads, m, dv]`` -> ``[n, heads, dv]`` in q's
    dtype, multiplied in ``dtype`` (default q's; sums and softmax are float32 at least). Query
    heads share key heads in consecutive groups. A query sees at most ``window`` tokens, its own
    included. No tensor of size n x m is made beyond BLOCK rows.
    """
    wanted, dtype = q.dtype, dtype or q.dtype
    n, m = q.shape[0], k.shape[1]
    if flash.supported(q, dtype):
        return flash.flash_attention(q, k, v, scale, window).to(wanted)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[0]
    heads_first = q.transpose(0, 1)

    def sdpa(rows: Tensor, keys: slice, mask: Tensor | None, causal: bool) -> Tensor:
        return scaled_dot_product_attention(
            rows[None],
            k[None, :, keys],
            v[None, :, keys],
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )[0]

    if n == 1:
        start = max(0, m - window) if window is not None else 0
        return sdpa(heads_first, slice(start, m), None, False).transpose(0, 1).to(wanted)
    if n == m and (window is None or m <= window):
        return sdpa(heads_first, slice(0, m), None, True).transpose(0, 1).to(wanted)
    if window is None and q.device.type == "cpu" and k.shape[2] == v.shape[2]:
        return _after_past(q, k, v, scale).to(wanted)
    parts = []
    for a in range(0, n, BLOCK):
        b = min(n, a + BLOCK)
        stop = m - n + b
        start = max(0, stop - (b - a) - window + 1) if window is not None else 0
        mask = visible(m - n + a - start, b - a, stop - start, window, q.device)
        parts.append(sdpa(heads_first[:, a:b], slice(start, stop), mask, False))
    return torch.cat(parts, dim=1).transpose(0, 1).to(wanted)


def _after_past(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``causal_attention`` of a chunk behind a past, in two parts that need no mask: the chunk to
    the past, where the query heads of a key head stand in one column of rows, and the chunk to
    itself. The parts are joined by their logarithms of summed weights."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    n, heads, dim = q.shape
    groups, m, _ = k.shape
    rows = q.view(n, groups, heads // groups, dim).permute(1, 2, 0, 3).reshape(1, groups, -1, dim)
    past, past_sum = flash(rows, k[None, :, : m - n], v[None, :, : m - n], scale=scale)
    own = [x[None, :, m - n :].repeat_interleave(heads // groups, 1) for x in (k, v)]
    here, here_sum = flash(q.transpose(0, 1)[None], *own, is_causal=True, scale=scale)
    # Softmax rounds a row alike however many there are; sigmoid, the same, goes by their number.
    sums = torch.stack([past_sum.reshape(heads, n), here_sum[0]], dim=-1)
    share = sums.softmax(dim=-1)[..., :1]
    mixed: Tensor = here[0].float().lerp_(past.reshape(heads, n, -1).float(), share)
    return mixed.transpose(0, 1)

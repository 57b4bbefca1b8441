"""Attention on packed codes as a Triton kernel, for CUDA devices.

The definition is ``packed.attend_torch``. Codes become numbers in registers, in the block of tokens
that is being scored, and query heads of a key head share them. Tests run it through Triton's
interpreter (``TRITON_INTERPRET=1``). It compiles for sm_80 and sm_90, and has not run on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from narrows.ops.packed import Numbers, PackedLayer

SPLIT = 512
"""Tokens of one program; the parts of a sequence are joined afterwards."""
TOKENS = 32
"""Tokens scored at once."""


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(codes, line, place, bits: tl.constexpr, seen):  # type: ignore[no-untyped-def]
    """Codes at ``place`` of ``line``, 64 a line, low bits first (``quant.pack``)."""
    at = place * bits
    packed = tl.load(codes + line * (8 * bits) + at // 8, mask=seen, other=0).to(tl.int32)
    return ((packed >> (at % 8)) & ((1 << bits) - 1)).to(tl.float32)


@triton.jit
def _dense(x, head_stride, kv, token, channel, dim, seen):  # type: ignore[no-untyped-def]
    """Elements of ``[kv_heads, tokens, dim]``, float32, zero where not ``seen``."""
    at = kv * head_stride + token[:, None] * dim + channel[None, :]
    return tl.load(x + at, mask=seen, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q,  # [kv_heads, rows, D] float32, scaled
    top_out,  # [kv_heads, splits, rows]
    total_out,  # the same
    out,  # [kv_heads, splits, rows, Dv]
    key_codes,
    key_scale,
    key_zero,
    k_sink,
    k_tail,
    value_codes,
    value_scale,
    value_zero,
    v_sink,
    v_tail,
    key_code_head,
    key_scale_head,
    key_zero_head,
    k_sink_head,
    k_tail_head,
    value_code_head,
    value_scale_head,
    value_zero_head,
    v_sink_head,
    v_tail_head,
    key_tokens,
    value_tokens,
    sink,
    length,
    n,  # newest tokens that attend
    rows,
    group: tl.constexpr,
    value_group: tl.constexpr,
    heads_a_key: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    has_key_codes: tl.constexpr,
    has_value_codes: tl.constexpr,
    key_bits: tl.constexpr,
    value_bits: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    kv = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    c = tl.arange(0, DV)
    query = tl.load(
        q + (kv * rows + row[:, None]) * dim + d[None, :],
        mask=(row[:, None] < rows) & (d[None, :] < dim),
        other=0.0,
    )
    limit = length - n + row // heads_a_key + 1  # tokens a row sees
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV], tl.float32)
    for start in range(0, SPLIT, TOKENS):
        t = part * SPLIT + start + tl.arange(0, TOKENS)
        u = t - sink
        inside = d[None, :] < dim
        in_sink = (t < sink)[:, None] & inside
        in_codes = ((u >= 0) & (u < key_tokens))[:, None] & inside
        in_tail = ((u >= key_tokens) & (t < length))[:, None] & inside
        k = _dense(k_sink, k_sink_head, kv, t, d, dim, in_sink)
        k += _dense(k_tail, k_tail_head, kv, u - key_tokens, d, dim, in_tail)
        coded = _dense(key_zero, key_zero_head, kv, u // group, d, dim, in_codes)
        if has_key_codes:
            line = (u // 16)[:, None] * (dim // 4) + (d // 4)[None, :]
            place = (u % 16)[:, None] * 4 + (d % 4)[None, :]
            code = _unpack(key_codes + kv * key_code_head, line, place, key_bits, in_codes)
            coded += code * _dense(key_scale, key_scale_head, kv, u // group, d, dim, in_codes)
        k += coded
        score = tl.dot(query, tl.trans(k), input_precision="ieee")
        score = tl.where(t[None, :] < limit[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        weight = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(weight, 1)

        inside = c[None, :] < value_dim
        in_sink = (t < sink)[:, None] & inside
        in_codes = ((u >= 0) & (u < value_tokens))[:, None] & inside
        in_tail = ((u >= value_tokens) & (t < length))[:, None] & inside
        v = _dense(v_sink, v_sink_head, kv, t, c, value_dim, in_sink)
        v += _dense(v_tail, v_tail_head, kv, u - value_tokens, c, value_dim, in_tail)
        groups = value_dim // value_group
        coded = _dense(value_zero, value_zero_head, kv, u, c // value_group, groups, in_codes)
        if has_value_codes:
            line = (u // 4)[:, None] * (value_dim // 16) + (c // 16)[None, :]
            place = (c % 16)[None, :] * 4 + (u % 4)[:, None]
            code = _unpack(value_codes + kv * value_code_head, line, place, value_bits, in_codes)
            scale = _dense(value_scale, value_scale_head, kv, u, c // value_group, groups, in_codes)
            coded += code * scale
        v += coded
        acc = acc * fade[:, None] + tl.dot(weight, v, input_precision="ieee")
        top = higher
    at = (kv * tl.num_programs(1) + part) * rows + row
    tl.store(top_out + at, top, mask=row < rows)
    tl.store(total_out + at, total, mask=row < rows)
    tl.store(
        out + at[:, None] * value_dim + c[None, :],
        acc,
        mask=(row[:, None] < rows) & (c[None, :] < value_dim),
    )


def attend(layer: PackedLayer, q: Tensor, scale: float) -> Tensor:
    """As ``packed.attend_torch``, for a few rows of ``q`` ``[n, heads, D]``."""
    n, heads, dim = q.shape
    kv_heads, _, value_dim = layer.v_tail.shape
    ratio = heads // kv_heads
    rows, splits = n * ratio, -(-layer.length // SPLIT)
    query = q.float().view(n, kv_heads, ratio, dim).transpose(0, 1).mul(scale).contiguous()
    top = query.new_empty((kv_heads, splits, rows))
    total = torch.empty_like(top)
    parts = query.new_empty((kv_heads, splits, rows, value_dim))
    key_rows, value_rows = layer.key_tokens // layer.group, layer.value_tokens
    tensors = [
        layer.key_codes,
        _plain(layer.key_scale, key_rows),
        _plain(layer.key_zero, key_rows),
        layer.k_sink,
        layer.k_tail,
        layer.value_codes,
        _plain(layer.value_scale, value_rows),
        _plain(layer.value_zero, value_rows),
        layer.v_sink,
        layer.v_tail,
    ]
    _attend[(kv_heads, splits)](
        *(query, top, total, parts),
        *(query if x is None else x for x in tensors),
        *(0 if x is None else x.stride(0) for x in tensors),
        *(layer.key_tokens, layer.value_tokens, layer.sink, layer.length, n, rows),
        group=layer.group,
        value_group=layer.value_group,
        heads_a_key=ratio,
        dim=dim,
        value_dim=value_dim,
        has_key_codes=layer.key_codes is not None,
        has_value_codes=layer.value_codes is not None,
        key_bits=layer.key_bits,
        value_bits=layer.value_bits,
        ROWS=max(16, triton.next_power_of_2(rows)),
        D=max(16, triton.next_power_of_2(dim)),
        DV=max(16, triton.next_power_of_2(value_dim)),
        SPLIT=SPLIT,
        TOKENS=TOKENS,
    )
    share = torch.exp(top - top.amax(1, keepdim=True))
    mixed = (parts * share[..., None]).sum(1) / (total * share).sum(1)[..., None]
    return mixed.view(kv_heads, n, ratio, value_dim).transpose(0, 1).flatten(1, 2).to(q.dtype)


def _plain(x: Numbers | None, rows: int) -> Tensor | None:
    """Numbers as a tensor; coarse ones are decoded (a small part of the cache)."""
    return x if x is None or isinstance(x, Tensor) else x.rows(0, rows)

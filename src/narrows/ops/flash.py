"""Causal attention of many new tokens in one kernel call, for processors with products of bfloat16
pairs, see ``flash.c``."""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ops.native import flash_is_slow, library

FEWEST = 16
"""New tokens from which on putting the keys in order for the kernel pays."""


def supported(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes queries ``[n, heads, d]`` multiplied in ``dtype`` with keys and
    values, and is the fastest."""
    native = library()
    if native is None or q.device.type != "cpu" or len(q) < FEWEST or not flash_is_slow(dtype):
        return False
    held = k.dtype is v.dtype is torch.bfloat16 and k.stride(2) == v.stride(2) == 1
    rows = k.stride(1) == k.shape[2] and v.stride(1) == v.shape[2]
    return held and rows and bool(native.flash_ready())


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """As ``causal_attention``, which defines it, in bfloat16 products; float32 in and out. A
    token's outcome is the same to the bit whatever the tokens beside it. Needs ``supported``."""
    native = library()
    assert native is not None
    n, heads, dim = q.shape
    groups, m, value_dim = v.shape
    q = q.float().contiguous()
    out = q.new_empty((n, heads, value_dim))
    room = torch.empty(native.flash_room(m, groups, dim, value_dim), dtype=torch.bfloat16)
    native.flash(
        *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        *(out.data_ptr(), n, m, heads, groups, dim, value_dim, scale, window or 0),
        *(room.data_ptr(), torch.get_num_threads()),
    )
    return out

"""Causal attention of many new tokens in one kernel call, for processors with products of bfloat16
pairs, see ``flash.c``."""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ops.native import flash_is_slow, library

FEWEST = 16
"""New tokens from which on putting the keys in order for the kernel pays."""


def supported(q: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes queries ``[n, heads, d]`` multiplied in ``dtype``, and is the
    fastest."""
    native = library()
    if native is None or q.device.type != "cpu" or len(q) < FEWEST:
        return False
    return flash_is_slow(dtype) and bool(native.flash_ready())


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    mass: Tensor | None = None,
    paid: tuple[int, int] | None = None,
    most: bool = False,
) -> Tensor:
    """As ``causal_attention``, which defines it, in bfloat16 products; float32 in and out. A
    token's outcome is the same to the bit whatever the tokens beside it. Needs ``supported``.

    ``mass``, float32 ``[m]`` or ``[heads, m]``, gains the weights that each token is given, by all
    query heads or by each; they are float32, before any rounding. It must be contiguous. With
    ``most`` it keeps the greatest weight instead. Only tokens of the span ``paid`` count, if given.
    """
    native = library()
    assert native is not None
    n, heads, dim = q.shape
    groups, m, value_dim = v.shape
    q, k, v = q.float().contiguous(), _rows(k), _rows(v)
    out = q.new_empty((n, heads, value_dim))
    threads, mass_rows = torch.get_num_threads(), 0
    room = torch.empty(native.flash_room(m, groups, dim, value_dim), dtype=torch.bfloat16)
    parts = None
    if mass is not None:
        assert mass.is_contiguous()
        mass_rows = mass.numel() // m
        parts = torch.empty(native.flash_mass_room(m, mass_rows, threads))
    native.flash(
        *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        *(out.data_ptr(), n, m, heads, groups, dim, value_dim, scale, window or 0),
        *(None if mass is None else mass.data_ptr(), mass_rows, *(paid or (0, m)), most),
        *(room.data_ptr(), None if parts is None else parts.data_ptr(), threads),
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """``x`` ``[heads, n, d]`` in bfloat16, the rows of a head next to each other."""
    x = x.bfloat16()
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()

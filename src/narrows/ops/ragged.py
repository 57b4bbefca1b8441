"""Append-and-attend for many sequences with few new tokens each, in one kernel call."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.ops.attention import causal_attention
from narrows.ops.native import library

CHUNK = 256  # as in native.c
MAX_GROUP = 16


class Place(NamedTuple):
    """One sequence's buffers ``[kv_heads, capacity, dim]``; ``stored`` counts this step's tokens
    too, whose rows in the flat batch are ``first_row`` and the ``rows - 1`` after it."""

    k: Tensor
    v: Tensor
    stored: int
    first_row: int
    rows: int


def supported(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel takes queries like ``q`` and buffers like ``k``."""
    return (
        q.dtype == torch.float32
        and q.device.type == "cpu"
        and k.dtype in (torch.float32, torch.bfloat16)
        and q.shape[1] // k.shape[0] <= MAX_GROUP
        and library() is not None
    )


def append_attend(
    places: list[Place], q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """Write each sequence's rows of ``k`` ``[T, kv_heads, d]`` and ``v`` into its buffers, then
    attend causally: ``q`` ``[T, heads, d]`` -> float32 ``[T, heads, dv]``. Rows that belong to no
    place are left unwritten. Needs ``supported``; the definition is ``append_attend_torch``."""
    native = library()
    assert native is not None
    heads, dim = q.shape[1:]
    kv_heads, value_dim = v.shape[1:]
    q, k, v = _rows(q), _rows(k), _rows(v)
    table: list[int] = []
    room = 0
    for p in places:
        table += (p.k.data_ptr(), p.v.data_ptr(), p.k.shape[1], p.stored, p.first_row, p.rows)
        room += p.rows * kv_heads * (p.stored // CHUNK + 1)
    out = q.new_empty((q.shape[0], heads, value_dim))
    tasks = torch.empty(4 * room, dtype=torch.int64)
    parts = torch.empty(room * (heads // kv_heads) * (value_dim + 2))
    used = native.append_attend(
        *((ctypes.c_int64 * len(table))(*table), len(places), q.data_ptr(), q.stride(0)),
        *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        *(out.data_ptr(), heads, kv_heads, dim, value_dim, scale, window or 0),
        int(places[0].k.dtype == torch.bfloat16),
        *(tasks.data_ptr(), parts.data_ptr(), room, torch.get_num_threads()),
    )
    assert used >= 0, "scratch was too small"
    return out


def append_attend_torch(
    places: list[Place], q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """The definition of ``append_attend``, one sequence at a time."""
    out = torch.zeros((*q.shape[:2], v.shape[2]))
    for p in places:
        rows = slice(p.first_row, p.first_row + p.rows)
        p.k[:, p.stored - p.rows : p.stored] = k[rows].transpose(0, 1)
        p.v[:, p.stored - p.rows : p.stored] = v[rows].transpose(0, 1)
        out[rows] = causal_attention(q[rows], p.k[:, : p.stored], p.v[:, : p.stored], scale, window)
    return out


def _rows(x: Tensor) -> Tensor:
    """``x`` with each row's heads contiguous (rows themselves may be strided)."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()

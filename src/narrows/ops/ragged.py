"""Append-and-attend for many sequences with few new tokens each, in one kernel call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from narrows.ops.attention import causal_attention, visible
from narrows.ops.native import library
from narrows.ops.rotary import turn

CHUNK = 256  # as in vector.h
MAX_GROUP = 16


@dataclass(frozen=True)
class Codes:
    """Vectors that are multiples of ``entries`` ``[c, dim]``, by ``entry`` and ``ratio`` ``[n]``,
    of keys then turned by ``turns`` ``[n]`` places, see ``cache.codebook``; ``steps`` are the
    rotary tables of ``contracts.Rotary.steps``."""

    entries: Tensor
    entry: Tensor
    ratio: Tensor
    turns: Tensor | None
    steps: tuple[Tensor, Tensor] | None

    @functools.cached_property
    def fields(self) -> tuple[int, ...]:
        """As in ragged.c."""
        turned, tables = (0, 0), (0, 0)
        if self.turns is not None:
            assert self.steps is not None
            turned = self.turns.data_ptr(), int(self.turns.dtype == torch.int32)
            tables = self.steps[0].data_ptr(), self.steps[1].data_ptr()
        coded = self.entries.data_ptr(), self.entry.data_ptr(), int(self.entry.dtype == torch.int32)
        return (*coded, self.ratio.data_ptr(), *turned, len(self.entry), *tables)


NO_CODES = (0,) * 9


@dataclass(slots=True)
class Place:
    """One sequence's buffers ``[kv_heads, capacity, dim]``; ``stored`` counts this step's tokens
    too, whose rows in the flat batch are ``first_row`` and the ``rows - 1`` after it.

    With one KV head, codes may stand for its first keys and values, whose buffers then begin
    behind them; and of the first tokens ``seen`` int16 ``[n]`` may say, a bit each, which query
    heads see them.

    The three numbers may be changed from step to step; other tensors need another place.
    """

    k: Tensor
    v: Tensor
    stored: int = 0
    first_row: int = 0
    rows: int = 0
    k_codes: Codes | None = None
    v_codes: Codes | None = None
    seen: Tensor | None = None
    capacity: int = field(init=False)
    told: ctypes.Array[ctypes.c_int64] | None = field(default=None, init=False, repr=False)
    """What ragged.c reads of it, once it has."""
    address: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.capacity = self.k.shape[1]

    def at(self, stored: int, first_row: int, rows: int) -> Place:
        """This place, with other numbers."""
        self.stored, self.first_row, self.rows = stored, first_row, rows
        return self


def supported(q: Tensor, k: Tensor, group: int | None = None) -> bool:
    """Whether the kernel takes queries like ``q`` and buffers like ``k``, of which each KV head
    has ``group`` query heads (None: as many as the shapes say)."""
    return (
        q.dtype == torch.float32
        and q.device.type == "cpu"
        and k.dtype in (torch.float32, torch.bfloat16)
        and (group or q.shape[1] // k.shape[0]) <= MAX_GROUP
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
    q, k, v = rows(q), rows(k), rows(v)
    table, room = tell(places), room_of(places, kv_heads)
    tasks, parts = workspace(room, heads // kv_heads * (value_dim + 2))
    out = q.new_empty((q.shape[0], heads, value_dim))
    used = native.append_attend(
        *(table, len(places), q.data_ptr(), q.stride(0)),
        *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        *(out.data_ptr(), heads, kv_heads, dim, value_dim, scale, window or 0),
        int(places[0].k.dtype == torch.bfloat16),
        *(tasks.data_ptr(), parts.data_ptr(), room, torch.get_num_threads()),
    )
    assert used >= 0, "scratch was too small"
    return out


def tell(places: Sequence[Place]) -> ctypes.Array[ctypes.c_void_p]:
    """What ragged.c reads of places, which are brought up to date."""
    addresses = []
    for p in places:
        told = p.told
        if told is None:
            told = p.told = _tell(p)
            p.address = ctypes.addressof(told)
        told[STORED], told[FIRST_ROW], told[COUNT] = p.stored, p.first_row, p.rows
        addresses.append(p.address)
    return (ctypes.c_void_p * len(places))(*addresses)


def room_of(places: Sequence[Place], kv_heads: int) -> int:
    """Parts that the kernel makes of places, at most."""
    return kv_heads * sum(p.rows * (p.stored // CHUNK + 1) for p in places)


def workspace(room: int, numbers: int) -> tuple[Tensor, Tensor]:
    """The tasks and the parts, of so many numbers each, that ragged.c works in."""
    return torch.empty(4 * room, dtype=torch.int64), torch.empty(room * numbers)


STORED, FIRST_ROW, COUNT = 3, 4, 5
"""Places in a ``place`` of ragged.c of what changes from step to step."""


def _tell(p: Place) -> ctypes.Array[ctypes.c_int64]:
    """One ``place`` of ragged.c."""
    seen = (0, 0) if p.seen is None else (p.seen.data_ptr(), len(p.seen))
    codes = (NO_CODES if c is None else c.fields for c in (p.k_codes, p.v_codes))
    buffers = (p.k.data_ptr(), p.v.data_ptr(), p.k.shape[1])
    numbers = (*buffers, 0, 0, 0, *next(codes), *next(codes), *seen)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def append_attend_torch(
    places: list[Place], q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """The definition of ``append_attend``, one sequence at a time."""
    out = torch.zeros((*q.shape[:2], v.shape[2]))
    for p in places:
        rows = slice(p.first_row, p.first_row + p.rows)
        sides = []
        for buffer, codes, new in ((p.k, p.k_codes, k), (p.v, p.v_codes, v)):
            stop = p.stored - (0 if codes is None else len(codes.entry))
            buffer[:, stop - p.rows : stop] = new[rows].transpose(0, 1)
            dense = buffer[:, :stop]
            sides.append(dense if codes is None else torch.cat([rebuild(codes)[None], dense], 1))
        if p.seen is None:
            out[rows] = causal_attention(q[rows], sides[0], sides[1], scale, window)
        else:
            out[rows] = masked_attention(q[rows], sides[0][0], sides[1][0], scale, p.seen)
    return out


def rebuild(codes: Codes) -> Tensor:
    """The vectors that codes stand for, in the entries' dtype ``[n, dim]``."""
    x = codes.entries[codes.entry.long()].float() * codes.ratio.float()[:, None]
    if codes.turns is None:
        return x.to(codes.entries.dtype)
    assert codes.steps is not None
    turns = codes.turns.long()
    cosine, sine = (table[turns.abs()].repeat(1, 2) for table in codes.steps)
    turned = turn(x[:, None], cosine, sine * turns.sign()[:, None])
    return turned[:, 0].to(codes.entries.dtype)


def seen_weights(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """Causal softmax weights float32 ``[group, n, tokens]`` of the newest ``n`` tokens' queries
    ``[n, group, dim]`` on one head's keys ``[tokens, dim]``. Of the first tokens only the query
    heads whose bits are set in ``seen`` ``[..]`` see each."""
    n, group, tokens = *q.shape[:2], len(k)
    mask = visible(tokens - n, n, tokens, None, q.device).repeat(group, 1, 1)
    if seen is not None:
        heads = torch.arange(group, device=q.device)[:, None]
        mask[:, :, : len(seen)] &= (seen.long() >> heads & 1).bool()[:, None]
    scores = (q.float().transpose(0, 1) @ k.float().T) * scale
    return scores.masked_fill_(~mask, -torch.inf).softmax(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Attention with ``seen_weights``: ``[n, group, dim]`` -> float32 ``[n, group, dv]``."""
    return (seen_weights(q, k, scale, seen) @ v.float()).transpose(0, 1)


def rows(x: Tensor) -> Tensor:
    """``x`` with each row's heads contiguous (rows themselves may be strided)."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()

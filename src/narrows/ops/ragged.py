"""Append-and-attend for many sequences with few new tokens each, in one kernel call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

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
DTYPES = torch.float32, torch.bfloat16


class Place:
    """Where keys and values of one sequence lie, of ``kv_heads`` heads of a layer from ``head`` on:
    buffers ``[kv_heads, capacity, dim]``, float32 or bfloat16. ``stored`` counts this step's tokens
    too, whose rows in the flat batch are ``first_row`` and the ``rows - 1`` after it. A token sees
    the newest ``window`` keys up to its own; None means all.

    With one KV head, codes may stand for its first keys and values, whose buffers then begin
    behind them; and of the first tokens ``seen`` int16 ``[n]`` may say, a bit each, which query
    heads see them.

    The three numbers may be changed from step to step (``at``); all else needs another place.
    """

    __slots__ = ("address", "capacity", "k", "k_codes", "seen", "told", "v", "v_codes", "window")

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        stored: int = 0,
        first_row: int = 0,
        rows: int = 0,
        k_codes: Codes | None = None,
        v_codes: Codes | None = None,
        seen: Tensor | None = None,
        head: int = 0,
        window: int | None = None,
    ) -> None:
        assert k.dtype is v.dtype
        assert k.dtype in DTYPES
        self.k, self.v, self.k_codes, self.v_codes = k, v, k_codes, v_codes
        self.seen, self.window, self.capacity = seen, window, k.shape[1]
        coded = [NO_CODES if c is None else c.fields for c in (k_codes, v_codes)]
        numbers = (
            *(k.data_ptr(), v.data_ptr(), self.capacity, stored, first_row, rows),
            *(head, k.shape[0], window or 0),
            *(*coded[0], *coded[1]),
            *((0, 0) if seen is None else (seen.data_ptr(), len(seen))),
        )
        self.told = (ctypes.c_int64 * len(numbers))(*numbers)
        """As ragged.c reads it."""
        self.address = ctypes.addressof(self.told)

    def at(self, stored: int, first_row: int, rows: int) -> Place:
        """This place, with other numbers."""
        told = self.told
        told[STORED], told[FIRST_ROW], told[ROWS] = stored, first_row, rows
        return self

    @property
    def stored(self) -> int:
        """See above."""
        return self.told[STORED]

    @property
    def first_row(self) -> int:
        """See above."""
        return self.told[FIRST_ROW]

    @property
    def rows(self) -> int:
        """See above."""
        return self.told[ROWS]

    @property
    def head(self) -> int:
        """See above."""
        return self.told[HEAD]


STORED, FIRST_ROW, ROWS, HEAD = 3, 4, 5, 6
"""Where a ``place`` of vector.h has them."""


def supported(q: Tensor, kv_heads: int) -> bool:
    """Whether the kernel takes queries like ``q`` ``[T, heads, d]``."""
    return (
        q.dtype == torch.float32
        and q.device.type == "cpu"
        and q.shape[1] // kv_heads <= MAX_GROUP
        and library() is not None
    )


def append_attend(
    places: Sequence[Place], q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor
) -> None:
    """Write each place's rows of ``k`` ``[T, kv_heads, d]`` and ``v``, of its heads, into its
    buffers, then attend causally: ``q`` ``[T, heads, d]`` -> ``out`` float32 ``[T, heads, dv]``,
    contiguous. What belongs to no place is left unwritten. Needs ``supported``; the definition is
    ``append_attend_torch``. Raises MemoryError."""
    native = library()
    assert native is not None
    q, k, v = rows(q), rows(k), rows(v)
    failed = native.append_attend(
        *(tell(places), len(places), q.data_ptr(), q.stride(0)),
        *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), out.data_ptr()),
        *(q.shape[1], k.shape[1], q.shape[2], v.shape[2], scale),
        *(int(places[0].k.dtype is torch.bfloat16), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(NO_ROOM)


NO_ROOM = "attention found no memory for its partial sums"


def tell(places: Sequence[Place]) -> ctypes.Array[ctypes.c_void_p]:
    """Places as ragged.c takes them."""
    return (ctypes.c_void_p * len(places))(*[place.address for place in places])


def append_attend_torch(
    places: Sequence[Place], q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor
) -> None:
    """The definition of ``append_attend``, one place at a time."""
    group = q.shape[1] // k.shape[1]
    for p in places:
        rows, heads = slice(p.first_row, p.first_row + p.rows), slice(p.head, p.head + len(p.k))
        queries = slice(heads.start * group, heads.stop * group)
        sides = []
        for buffer, codes, new in ((p.k, p.k_codes, k), (p.v, p.v_codes, v)):
            stop = p.stored - (0 if codes is None else len(codes.entry))
            buffer[:, stop - p.rows : stop] = new[rows, heads].transpose(0, 1)
            dense = buffer[:, :stop]
            sides.append(dense if codes is None else torch.cat([rebuild(codes)[None], dense], 1))
        if p.seen is None:
            mixed = causal_attention(q[rows, queries], sides[0], sides[1], scale, p.window)
        else:
            mixed = masked_attention(q[rows, queries], sides[0][0], sides[1][0], scale, p.seen)
        out[rows, queries] = mixed


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

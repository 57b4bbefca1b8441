"""A SpecFormer's draft in two kernel calls, see ``forecast.c``; its weights are read as bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narrows.ops.native import library
from narrows.ops.pages import reserve
from narrows.ops.ragged import NO_ROOM, Place, tell

CODED = (
    *("fuse", "context_qkv", "context_out"),
    *("spread", "anchor", "qkv", "out", "gate_up", "down", "head", "after"),
)
"""The weights."""


class _Forecaster(ctypes.Structure):
    """As in forecast.c."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *CODED,
                *("spread_bias", "slot_bias"),
                *("fuse_norm", "context_norm", "spread_norm", "token_norm", "slot_norm"),
                *("mlp_norm", "final_norm", "cosine", "sine"),
                *("narrowed", "vocabulary"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("groups", "hidden", "heads", "kv_heads", "dim", "slots"),
                *("wide", "named", "markov", "causal"),
            )
        ),
        ("eps", ctypes.c_float),
        ("final_eps", ctypes.c_float),
    ]


ZERO, TOP = 128, 127
"""The code of 0, and how far codes go above and below it."""


def in_bytes(weight: Tensor) -> Tensor:
    """``weight`` ``[n, k]`` as ``bytes.c`` reads it: uint8 codes ``[n, k]``, row by row, and behind
    them float32 scales ``[n]``."""
    weight = weight.float()
    units = weight.abs().amax(1) / TOP
    codes = (weight / units.clamp(min=torch.finfo().tiny)[:, None]).round() + ZERO
    return torch.cat([codes.to(torch.uint8).flatten(), units.view(torch.uint8)])


def linear_bytes_torch(x: Tensor, coded: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    """The definition of ``linear_bytes`` of ``bytes.c``: ``x`` float32 ``[m, k]`` times a weight of
    ``rows`` rows ``in_bytes``, transposed, plus ``bias`` ``[rows]``: float32 ``[m, rows]``. Each
    row of x is rounded to 8 bits against its greatest number."""
    inner = x.shape[1]
    top = x.abs().amax(1, keepdim=True)
    whole = (x * torch.where(top > 0, TOP / top, 0.0)).round()
    codes = coded[: rows * inner].view(rows, inner).double() - ZERO
    scales = coded[rows * inner :].clone().view(torch.float32)
    out = (whole.double() @ codes.T).float() * (top / TOP) * scales
    return out if bias is None else out + bias


class Forecaster:
    """One SpecFormer as the kernel reads it.

    Args:
        weights: what the kernel's structure points to, by its names there: ``[out, in]`` those that
            are multiplied with, which are put ``in_bytes``, ``narrowed`` bfloat16, biases, norms
            and rotary tables float32, ``vocabulary`` int64; None where a module has none.
        sizes: its numbers.
    """

    def __init__(self, weights: dict[str, Tensor | None], sizes: dict[str, Any]) -> None:
        given = {name: x for name, x in weights.items() if x is not None}
        told = [in_bytes(x) if name in CODED else x for name, x in given.items()]
        kept = reserve([(x.shape, x.dtype) for x in told])
        self._kept = {n: to.copy_(x) for n, to, x in zip(given, kept, told, strict=True)}
        pointers = {name: x.data_ptr() for name, x in self._kept.items()}
        self._told = _Forecaster(**pointers, **sizes)

    def absorb(self, places: list[Place], ends: Sequence[int], taps: Tensor) -> Tensor:
        """Context vectors float32 ``[n, hidden]`` behind the newest tokens of sequences, given what
        the target made of all their new tokens, ``taps`` float32 ``[rows, groups, hidden]``, of
        which those of each sequence stop at one of ``ends``. ``places`` are where the newest of
        each goes in its cache, which must have room for those before it, too. Raises
        MemoryError."""
        native, told, n = library(), self._told, len(places)
        assert native is not None
        places = [p.at(p.stored, i, 1) for i, p in enumerate(places)]
        taps, contexts = taps.contiguous(), torch.empty((n, told.hidden))
        room = torch.empty(native.absorb_room(ctypes.addressof(told), n))
        failed = native.absorb(
            *(ctypes.addressof(told), n, tell(places), (ctypes.c_int64 * n)(*ends)),
            *(taps.data_ptr(), int(places[0].k.dtype == torch.bfloat16)),
            *(contexts.data_ptr(), room.data_ptr(), torch.get_num_threads()),
        )
        if failed:
            raise MemoryError(NO_ROOM)
        return contexts

    def forecast(
        self, contexts: Tensor, newest: Tensor, entered: Tensor, most: int, least: float
    ) -> tuple[Tensor, Tensor]:
        """The likeliest ``most`` tokens, int64 ``[n, most]``, behind ``contexts`` float32 ``[n,
        hidden]`` and the tokens ``newest`` int64 ``[n]`` that followed them, which enter the model
        as ``entered`` float32 ``[n, hidden]``, and how likely each is, float32 ``[n, most]``; -1
        and 0 where those before are together less likely than ``least``."""
        native, n = library(), len(contexts)
        assert native is not None
        told = ctypes.addressof(self._told)
        contexts, entered = contexts.contiguous(), entered.contiguous()
        room = torch.empty(native.forecast_room(told, n))
        found, chance = torch.empty((n, most), dtype=torch.int64), torch.empty((n, most))
        native.forecast(
            *(told, n, contexts.data_ptr(), newest.data_ptr()),
            *(entered.data_ptr(), most, least),
            *(found.data_ptr(), chance.data_ptr(), room.data_ptr(), torch.get_num_threads()),
        )
        return found, chance

"""The likeliest tokens of a SpecFormer's slots in one kernel call, see ``forecast.c``."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from narrows.ops.native import KERNEL_ROWS, library


class _Forecaster(ctypes.Structure):
    """As in forecast.c."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("spread", "anchor", "qkv", "out", "gate_up", "down", "head", "after"),
                *("spread_bias", "slot_bias"),
                *("spread_norm", "token_norm", "slot_norm", "mlp_norm", "final_norm"),
                *("narrowed", "vocabulary"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("hidden", "heads", "kv_heads", "dim", "slots"),
                *("wide", "named", "markov", "causal"),
            )
        ),
        ("eps", ctypes.c_float),
        ("final_eps", ctypes.c_float),
    ]


class Forecaster:
    """One SpecFormer as the kernel reads it.

    Args:
        weights: bfloat16 ``[out, in]`` or None: ``spread``, ``anchor``, ``qkv``, ``out``,
            ``gate_up``, ``down``, ``head``, ``after``, ``narrowed``; float32 or None:
            ``spread_bias``, ``slot_bias`` and the norms; int64 or None: ``vocabulary``.
        sizes: ``hidden``, ``heads``, ``kv_heads``, ``dim``, ``slots``, ``wide``, ``named``,
            ``markov``, ``causal``, ``eps``, ``final_eps``.
    """

    def __init__(self, weights: dict[str, Tensor | None], sizes: dict[str, Any]) -> None:
        self._kept = {name: x.contiguous() for name, x in weights.items() if x is not None}
        pointers = {name: x.data_ptr() for name, x in self._kept.items()}
        self._told = _Forecaster(**pointers, **sizes)
        self.most = KERNEL_ROWS // sizes["slots"]
        """Sequences for which the kernel is faster than one operation after the other."""

    def __call__(self, contexts: Tensor, newest: Tensor, entered: Tensor, most: int) -> Tensor:
        """The likeliest ``most`` tokens, int64 ``[n, most]``, behind ``contexts`` float32 ``[n,
        hidden]`` and the tokens ``newest`` int64 ``[n]`` that followed them, which enter the model
        as ``entered`` float32 ``[n, hidden]``."""
        native, n = library(), len(contexts)
        assert native is not None
        told = ctypes.addressof(self._told)
        room = torch.empty(native.forecast_room(told, n))
        found = torch.empty((n, most), dtype=torch.int64)
        native.forecast(
            *(told, n, contexts.contiguous().data_ptr(), newest.data_ptr()),
            *(entered.contiguous().data_ptr(), most, found.data_ptr(), room.data_ptr()),
            torch.get_num_threads(),
        )
        return found

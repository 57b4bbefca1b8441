"""The two halves of a decoder layer around its attention: norm, query, key and value, rotation; and
output, norm, gated MLP. Few rows take one kernel call each, or one for all layers where kernels
write all their caches, see ``decoder.c``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.ops import packed, ragged
from narrows.ops.native import (
    add_rms_norm,
    few_rows,
    flow_dtype,
    library,
    linear,
    norm_rotate_,
    silu_mul,
)
from narrows.ops.places import Places
from narrows.ops.ragged import MAX_GROUP, NO_ROOM


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, all contiguous; norms and biases are float32."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    first_norm: Tensor
    second_norm: Tensor
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    hidden: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    wide: int
    eps: float
    scale: float

    @functools.cached_property
    def ends(self) -> tuple[int, int]:
        """Where queries end in a row of the first half's outcome, and where keys do."""
        queries = self.heads * self.key_dim
        return queries, queries + self.kv_heads * self.key_dim

    @functools.cached_property
    def told(self) -> ctypes.Structure:
        """As decoder.c reads it."""
        held = {field[0]: getattr(self, field[0]) for field in _Layer._fields_}
        return _Layer(**{k: x.data_ptr() if isinstance(x, Tensor) else x for k, x in held.items()})

    @functools.cached_property
    def address(self) -> int:
        """Where that lies."""
        return ctypes.addressof(self.told)


class _Layer(ctypes.Structure):
    """As in decoder.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("first_norm", "second_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias", "q_norm", "k_norm")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("key_dim", "value_dim", "wide")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    ]


def before_attention(
    layer: Layer, h: Tensor, delta: Tensor | None, cosine: Tensor, sine: Tensor
) -> Tensor:
    """Add ``delta`` to ``h`` float32 ``[m, hidden]`` in place; what the layer's attention takes of
    it: float32 ``[m, heads + kv_heads, key_dim]`` rotated by ``cosine``, ``sine`` float32 ``[m,
    key_dim]``, and behind them in each row the values ``[kv_heads, value_dim]``."""
    rows, turned = len(h), layer.heads + layer.kv_heads
    if few_rows(rows, layer.qkv):
        native = library()
        assert native is not None
        x, qkv = torch.empty_like(h), h.new_empty((rows, len(layer.qkv)))
        native.before_attention(
            *(layer.address, h.data_ptr(), None if delta is None else delta.data_ptr()),
            *(cosine.data_ptr(), sine.data_ptr(), x.data_ptr(), qkv.data_ptr()),
            *(rows, torch.get_num_threads()),
        )
        return qkv
    x = add_rms_norm(h, delta, layer.first_norm, layer.eps, flow_dtype(rows, layer.qkv))
    qkv = linear(x, layer.qkv, layer.qkv_bias).float()
    turning = qkv[:, : turned * layer.key_dim].view(rows, turned, layer.key_dim)
    if layer.q_norm is None:
        norm_rotate_(turning, None, layer.eps, cosine, sine)
    else:
        norm_rotate_(turning[:, : layer.heads], layer.q_norm, layer.eps, cosine, sine)
        norm_rotate_(turning[:, layer.heads :], layer.k_norm, layer.eps, cosine, sine)
    return qkv


def after_attention(layer: Layer, h: Tensor, mixed: Tensor) -> Tensor:
    """Add to ``h`` what attention ``mixed`` ``[m, heads * value_dim]``, and what is still to be
    added to it: the MLP's outcome ``[m, hidden]``."""
    rows = len(h)
    if few_rows(rows, layer.out):
        native = library()
        assert native is not None
        mixed, delta, x = mixed.contiguous(), torch.empty_like(h), torch.empty_like(h)
        room = h.new_empty(rows * 3 * layer.wide)
        native.after_attention(
            *(layer.address, h.data_ptr(), mixed.data_ptr(), delta.data_ptr(), x.data_ptr()),
            *(room.data_ptr(), rows, torch.get_num_threads()),
        )
        return delta
    flow = flow_dtype(rows, layer.out)
    delta = linear(mixed.to(flow), layer.out, layer.out_bias)
    x = add_rms_norm(h, delta, layer.second_norm, layer.eps, flow)
    return linear(silu_mul(linear(x, layer.gate_up)), layer.down)


class Decoder:
    """All layers, run in one call."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._told = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))
        self._group = max(layer.heads // layer.kv_heads for layer in layers)

    def takes(self, rows: int) -> bool:
        """Whether so many rows can be run in one call."""
        return self._group <= MAX_GROUP and few_rows(rows, self.layers[0].qkv)

    def __call__(
        self,
        h: Tensor,
        cosine: Tensor,
        sine: Tensor,
        places: Places,
        taps: Mapping[int, Tensor],
        seen: Tensor | None = None,
    ) -> Tensor:
        """Run ``h`` float32 ``[m, hidden]`` through all layers, in place but for what is still to
        be added to it, which is given back: as ``before_attention``, ``append_attend`` of
        ``ragged`` and of ``packed`` at the layer's ``places``, and ``after_attention`` of one layer
        after the other, which define it. What enters layer ``i`` goes to ``taps[i]`` ``[n,
        hidden]``, alike in stride: the rows ``seen`` int64 ``[n]``, None: all. Raises
        MemoryError."""
        native, layers = library(), self.layers
        assert native is not None
        rows, delta = len(h), torch.empty_like(h)
        room = h.new_empty(native.decode_room(self._told, len(layers), rows))
        wanted = (ctypes.c_void_p * len(layers))()
        for number, tap in taps.items():
            wanted[number] = tap.data_ptr()
        stride = next((tap.stride(0) for tap in taps.values()), 0)
        seen = torch.arange(rows) if seen is None else seen
        failed = native.decode(
            *(self._told, len(layers), h.data_ptr(), delta.data_ptr()),
            *(cosine.data_ptr(), sine.data_ptr()),
            *(ragged.tell(places.dense), _told(places.dense_ends)),
            *(packed.tell(places.coded), _told(places.coded_ends)),
            *(int(places.dtype is torch.bfloat16), wanted, stride),
            *(seen.data_ptr(), len(seen), room.data_ptr(), rows, torch.get_num_threads()),
        )
        if failed:
            raise MemoryError(NO_ROOM)
        return delta


def _told(ends: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(ends))(*ends)

"""Attention on packed codes: the record of one layer, the definition, and what runs it.

A layer's tokens lie in three stretches: ``sink`` dense ones, the quantised ones, and a dense tail.
Keys and values are cut at different tokens (sheet 3.3). Zero points are factored out (sheet 11):
``score = (q * scale) . code + q . zero`` with one number a key group for the second term, and
likewise for values, so that codes are never made dense beyond a block of tokens.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.ops import quant, ragged
from narrows.ops.native import library

FEW = 16
"""New tokens of a sequence up to which the kernels run; more go through ``attend_torch``."""
BLOCK = 1024
"""Tokens whose codes are unpacked at once by ``attend_torch``."""
ROWS = 256
"""New tokens it scores at once."""
MAX_GROUP, MAX_DIM = 64, 256  # as in packed.c
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in packed.c


class Coarse(NamedTuple):
    """Scales or zero points that are themselves codes, ``low + code * step``.

    ``codes`` uint8 ``[kv_heads, blocks, size * bits / 8]`` (``quant.pack``) hold the numbers of a
    head in the order of ``[n, m]``, ``size`` a block; ``step`` and ``low`` float16 ``[kv_heads,
    blocks]``; ``width`` is m. bits is 4 or 8.
    """

    codes: Tensor
    step: Tensor
    low: Tensor
    bits: int
    width: int

    @property
    def size(self) -> int:
        """Numbers of one block."""
        return self.codes.shape[2] * 8 // self.bits

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows [first, stop) of ``[kv_heads, n, m]``, float32."""
        a, b = first * self.width // self.size, -(-stop * self.width // self.size)
        codes = quant.unpack(self.codes[:, a:b], self.bits).float()
        numbers = codes * self.step[:, a:b, None].float() + self.low[:, a:b, None].float()
        start = first * self.width - a * self.size
        count = (stop - first) * self.width
        return numbers.flatten(1)[:, start : start + count].reshape(len(codes), -1, self.width)


Numbers = Tensor | Coarse
"""Scales or zero points ``[kv_heads, n, m]``: float32, float16, bfloat16, or coarse."""


@dataclass(slots=True)
class PackedLayer:
    """What attention reads of one layer of one sequence, ``length`` tokens in all.

    Tokens ``[0, sink)`` are dense in ``k_sink`` ``[kv_heads, sink, D]`` and ``v_sink``
    ``[kv_heads, sink, Dv]``. Of those behind it ``key_tokens`` (a multiple of ``group``, which is
    one of 16) have packed keys and ``value_tokens`` packed values; the others stand from the start
    of ``k_tail`` ``[kv_heads, capacity, D]`` and ``v_tail``. Tails and sinks are float32 or
    bfloat16, all the same.

    ``key_codes`` is in the order of ``quant.key_lines``, ``value_codes`` in that of
    ``quant.value_lines``; both may be longer than the counts say and may be another layer's.
    ``key_scale``, ``key_zero`` are ``[kv_heads, tokens / group, D]``, ``value_scale``,
    ``value_zero`` ``[kv_heads, tokens, Dv / value_group]``. Codes and scale None: zero points only.

    The newest ``rows`` tokens are those of a flat batch from ``first_row`` on, for
    ``append_attend``. These two, ``key_tokens``, ``value_tokens`` and ``length`` may be changed;
    other tensors need another record.
    """

    key_codes: Tensor | None
    key_bits: int
    key_scale: Numbers | None
    key_zero: Numbers
    key_tokens: int
    value_codes: Tensor | None
    value_bits: int
    value_scale: Numbers | None
    value_zero: Numbers
    value_tokens: int
    group: int
    value_group: int
    k_tail: Tensor
    v_tail: Tensor
    k_sink: Tensor
    v_sink: Tensor
    length: int
    first_row: int = 0
    rows: int = 0
    told: ctypes.Array[ctypes.c_int64] | None = field(default=None, init=False, repr=False)
    """What packed.c reads of it, once it has."""
    address: int = field(default=0, init=False, repr=False)

    @property
    def sink(self) -> int:
        """Dense tokens at the start."""
        return self.k_sink.shape[1]

    def at(self, first_row: int, rows: int) -> PackedLayer:
        """This record, for other rows."""
        self.first_row, self.rows = first_row, rows
        return self


# ------------------------------------------------------------------------------ the definition


def attend_torch(layer: PackedLayer, q: Tensor, scale: float) -> Tensor:
    """Causal attention of ``q`` ``[n, heads, D]``, the newest n tokens -> ``[n, heads, Dv]`` in
    q's dtype; computed in float32. Query heads share key heads in consecutive groups."""
    n, heads, dim = q.shape
    kv_heads, _, value_dim = layer.v_tail.shape
    group = heads // kv_heads
    out = q.new_empty((n, heads, value_dim))
    for a in range(0, n, ROWS):
        b = min(n, a + ROWS)
        rows = q[a:b].float().reshape(b - a, kv_heads, group, dim).transpose(0, 1) * scale
        seen = torch.arange(layer.length - n + a + 1, layer.length - n + b + 1, device=q.device)
        mixed = _attend_rows(layer, rows.flatten(1, 2), seen.repeat_interleave(group))
        mixed = mixed.view(kv_heads, b - a, group, value_dim).transpose(0, 1)
        out[a:b] = mixed.flatten(1, 2)
    return out


def _attend_rows(layer: PackedLayer, q: Tensor, seen: Tensor) -> Tensor:
    """Scaled ``q`` float32 ``[kv_heads, rows, D]``, of which row r sees ``seen[r]`` tokens ->
    ``[kv_heads, rows, Dv]``; softmax over blocks as they come."""
    top = q.new_full((*q.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(top)
    out = q.new_zeros((*q.shape[:2], layer.v_tail.shape[2]))
    for a, b in _blocks(layer):
        token = torch.arange(a, b, device=q.device)
        score = _scores(layer, q, a, b).masked_fill(token >= seen[:, None], -torch.inf)
        higher = torch.maximum(top, score.amax(-1, keepdim=True))
        weight, fade = torch.exp(score - higher), torch.exp(top - higher)
        total = total * fade + weight.sum(-1, keepdim=True)
        out = out * fade + _mix(layer, weight, a, b)
        top = higher
    return out / total


def _blocks(layer: PackedLayer) -> Iterator[tuple[int, int]]:
    """Tokens in blocks; the sink is one, and the others begin where groups do."""
    size = max(1, BLOCK // layer.group) * layer.group
    if layer.sink:
        yield 0, layer.sink
    for a in range(layer.sink, layer.length, size):
        yield a, min(a + size, layer.length)


def _scores(layer: PackedLayer, q: Tensor, a: int, b: int) -> Tensor:
    """``q . key`` of tokens [a, b): ``[kv_heads, rows, b - a]``."""
    sink, group, end = layer.sink, layer.group, layer.sink + layer.key_tokens
    first, tail = min(max(a, sink), b), min(max(a, end), b)
    parts = [q @ layer.k_sink[:, a:first].float().transpose(1, 2)]
    if first < tail:
        zero = _rows(layer.key_zero, (first - sink) // group, (tail - sink) // group)
        packed = (q @ zero.transpose(1, 2)).repeat_interleave(group, 2)
        if layer.key_codes is not None and layer.key_scale is not None:
            scale = _rows(layer.key_scale, (first - sink) // group, (tail - sink) // group)
            codes = _key_codes(layer, layer.key_codes, first - sink, tail - sink).float()
            groups = codes.view(codes.shape[0], -1, group, codes.shape[2])
            product = (q[:, None] * scale[:, :, None]) @ groups.transpose(2, 3)
            packed += product.transpose(1, 2).flatten(2)
        parts.append(packed)
    parts.append(q @ layer.k_tail[:, tail - end : b - end].float().transpose(1, 2))
    return torch.cat(parts, dim=-1)


def _mix(layer: PackedLayer, weight: Tensor, a: int, b: int) -> Tensor:
    """Sum of ``weight`` ``[kv_heads, rows, b - a]`` times the values of tokens [a, b)."""
    sink, group, end = layer.sink, layer.value_group, layer.sink + layer.value_tokens
    first, tail = min(max(a, sink), b), min(max(a, end), b)
    out = weight[..., : first - a] @ layer.v_sink[:, a:first].float()
    out += weight[..., tail - a :] @ layer.v_tail[:, tail - end : b - end].float()
    if first < tail:
        p = weight[..., first - a : tail - a]
        zero = _rows(layer.value_zero, first - sink, tail - sink)
        out += (p @ zero).repeat_interleave(group, 2)
        if layer.value_codes is not None and layer.value_scale is not None:
            scale = _rows(layer.value_scale, first - sink, tail - sink)
            codes = _value_codes(layer, layer.value_codes, first - sink, tail - sink).float()
            groups = codes.view(*codes.shape[:2], -1, group).transpose(1, 2)
            product = (p[:, None] * scale.transpose(1, 2)[:, :, None]) @ groups
            out += product.transpose(1, 2).flatten(2)
    return out


def _rows(x: Numbers, first: int, stop: int) -> Tensor:
    """Rows [first, stop) of the numbers, float32."""
    return x.rows(first, stop) if isinstance(x, Coarse) else x[:, first:stop].float()


def _key_codes(layer: PackedLayer, lines: Tensor, first: int, stop: int) -> Tensor:
    """Codes ``[kv_heads, stop - first, D]`` of quantised tokens; bounds are multiples of 16."""
    return quant.key_codes(lines[:, first // quant.LANES : stop // quant.LANES], layer.key_bits)


def _value_codes(layer: PackedLayer, lines: Tensor, first: int, stop: int) -> Tensor:
    """Codes ``[kv_heads, stop - first, Dv]`` of quantised tokens; ``first`` a multiple of 4."""
    quads = lines[:, first // quant.QUAD : -(-stop // quant.QUAD)]
    return quant.value_codes(quads, layer.value_bits)[:, : stop - first]


def dense(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """The keys ``[kv_heads, length, D]`` and values that attention sees, float32 (for tests and
    adapters; attention itself never makes them)."""
    keys, values = layer.key_tokens, layer.value_tokens
    k = _rows(layer.key_zero, 0, keys // layer.group).repeat_interleave(layer.group, 1)
    if layer.key_codes is not None and layer.key_scale is not None:
        scale = _rows(layer.key_scale, 0, keys // layer.group).repeat_interleave(layer.group, 1)
        k = k + scale * _key_codes(layer, layer.key_codes, 0, keys)
    v = _rows(layer.value_zero, 0, values).repeat_interleave(layer.value_group, 2)
    if layer.value_codes is not None and layer.value_scale is not None:
        scale = _rows(layer.value_scale, 0, values).repeat_interleave(layer.value_group, 2)
        v = v + scale * _value_codes(layer, layer.value_codes, 0, values)
    rest = layer.length - layer.sink
    k_tail, v_tail = layer.k_tail[:, : rest - keys], layer.v_tail[:, : rest - values]
    return (
        torch.cat([layer.k_sink.float(), k, k_tail.float()], 1),
        torch.cat([layer.v_sink.float(), v, v_tail.float()], 1),
    )


# ------------------------------------------------------------------------------------- dispatch


TRITON_ROWS = 64
"""New tokens times query heads a key head up to which the Triton kernel runs."""


@functools.cache
def _triton() -> Callable[[PackedLayer, Tensor, float], Tensor] | None:
    try:
        from narrows.ops.packed_triton import attend as kernel
    except ImportError:
        return None
    return kernel


def takes(layer: PackedLayer, n: int) -> bool:
    """Whether the compiled kernel takes ``n`` new tokens of a layer at once, see
    ``append_attend``."""
    return _fits(layer, n) and library() is not None and sys.byteorder == "little"


def _fits(layer: PackedLayer, n: int) -> bool:
    return (
        n <= FEW
        and max(layer.k_tail.shape[2], layer.v_tail.shape[2]) <= MAX_DIM
        and layer.group % quant.LANES == 0
        and layer.value_group % quant.LANES == 0
    )


def implementation(layer: PackedLayer, q: Tensor) -> str:
    """What ``attend`` runs for ``q`` ``[n, heads, D]``: "int8" (products of 16 bit coefficients,
    made by the processor's int8 units), "floats" (where it has none, and for float32 caches, whose
    precision int8 would lose), "triton", or "torch" (the definition)."""
    n, group = len(q), q.shape[1] // layer.v_tail.shape[0]
    if group <= MAX_GROUP and q.device.type == "cpu" and takes(layer, n):
        compiled = library()
        assert compiled is not None
        exact = layer.k_tail.dtype is torch.float32 or not compiled.packed_int8()
        return "floats" if exact else "int8"
    if q.device.type == "cuda" and _fits(layer, n) and n * group <= TRITON_ROWS and _triton():
        return "triton"
    return "torch"


def attend(layer: PackedLayer, q: Tensor, scale: float) -> Tensor:
    """Causal attention of ``q`` ``[n, heads, D]``, the newest n tokens -> ``[n, heads, Dv]`` in q's
    dtype. Raises ValueError as ``append_attend`` does."""
    kind = implementation(layer, q)
    if kind in ("int8", "floats"):
        out = torch.empty((*q.shape[:2], layer.v_tail.shape[2]))
        append_attend([layer.at(0, len(q))], q.float(), None, scale, out)
        return out.to(q.dtype)
    _check(layer, len(q))
    if kind == "triton":
        kernel = _triton()
        assert kernel is not None
        return kernel(layer, q, scale)
    return attend_torch(layer, q, scale)


def append_attend(
    layers: Sequence[PackedLayer],
    q: Tensor,
    new: tuple[Tensor, Tensor] | None,
    scale: float,
    out: Tensor,
) -> None:
    """Causal attention of the rows of ``q`` float32 ``[T, heads, D]`` that are the newest tokens of
    ``layers``, each of another sequence -> those of ``out`` float32 ``[T, heads, Dv]``, contiguous.
    ``new``, if given, are keys float32 ``[T, kv_heads, D]`` and values of these tokens, which are
    counted in ``length`` already and are written to the tails before anything is read. Needs
    ``takes`` of each; the definition is ``attend_torch``.

    Raises ValueError if a token that only some of the rows may see is in the sink or quantised: the
    sequence must then be attended to in steps. Raises MemoryError.
    """
    native = library()
    assert native is not None
    for layer in layers:
        _check(layer, layer.rows)
    q, tail = ragged.rows(q), layers[0].v_tail
    written = (0, 0, 0, 0)
    if new is not None:
        k, v = (ragged.rows(x) for x in new)
        written = (k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0))
    failed = native.attend_packed(
        *(tell(layers), len(layers), q.data_ptr(), q.stride(0), *written),
        *(out.data_ptr(), q.shape[1], tail.shape[0], q.shape[2], tail.shape[2], scale),
        *(tail.dtype is torch.bfloat16, tail.dtype is torch.float32, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(ragged.NO_ROOM)


def _check(layer: PackedLayer, rows: int) -> None:
    stored = layer.sink + max(layer.key_tokens, layer.value_tokens)
    if stored > layer.length - rows + 1:
        raise ValueError(
            f"{rows} rows at once, but {stored} of {layer.length} tokens are no longer in the"
            " dense tail; attend in smaller steps"
        )


def tell(layers: Sequence[PackedLayer]) -> ctypes.Array[ctypes.c_void_p]:
    """Layers as packed.c takes them."""
    addresses = []
    for layer in layers:
        told = layer.told
        if told is None:
            told = layer.told = _tell(layer)
            layer.address = ctypes.addressof(told)
        told[KEY_TOKENS], told[VALUE_TOKENS] = layer.key_tokens, layer.value_tokens
        told[LENGTH], told[FIRST_ROW], told[COUNT] = layer.length, layer.first_row, layer.rows
        addresses.append(layer.address)
    return (ctypes.c_void_p * len(layers))(*addresses)


SIDE = 23
"""Numbers of a ``side`` of packed.c."""
KEY_TOKENS, VALUE_TOKENS, LENGTH = 3, SIDE + 3, 2 * SIDE + 1
FIRST_ROW, COUNT = 2 * SIDE + 2, 2 * SIDE + 3
"""Places in a ``packed_place`` of what changes from step to step."""


def _tell(layer: PackedLayer) -> ctypes.Array[ctypes.c_int64]:
    """One ``packed_place`` of packed.c."""
    key = (layer.key_tokens, layer.group, layer.key_scale, layer.key_zero)
    value = (layer.value_tokens, layer.value_group, layer.value_scale, layer.value_zero)
    numbers = (
        *_side(layer.key_codes, layer.key_bits, *key, layer.k_sink, layer.k_tail),
        *_side(layer.value_codes, layer.value_bits, *value, layer.v_sink, layer.v_tail),
        *(layer.sink, layer.length, 0, 0),
    )
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _side(
    codes: Tensor | None,
    bits: int,
    tokens: int,
    group: int,
    scale: Numbers | None,
    zero: Numbers,
    sink: Tensor,
    tail: Tensor,
) -> tuple[int, ...]:
    """One ``side`` of packed.c."""
    where = (0, 0) if codes is None else (codes.data_ptr(), codes.stride(0))
    numbers = (*_numbers(scale), *_numbers(zero))
    dense = (sink.data_ptr(), tail.data_ptr(), sink.stride(0), tail.stride(0))
    return (*where, bits, tokens, group, *numbers, *dense)


def _numbers(x: Numbers | None) -> tuple[int, ...]:
    """One ``numbers`` of packed.c."""
    if x is None:
        return (0,) * 7
    if isinstance(x, Coarse):
        where = (x.codes.data_ptr(), x.codes.stride(0), 3 if x.bits == 8 else 4)
        return (*where, x.step.data_ptr(), x.low.data_ptr(), x.step.stride(0), x.size)
    return (x.data_ptr(), x.stride(0), KINDS[x.dtype], 0, 0, 0, 0)

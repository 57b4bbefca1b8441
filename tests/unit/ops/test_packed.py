"""Attention on packed codes against making them dense first."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from narrows.ops import native, packed, quant
from narrows.ops.packed import Coarse, PackedLayer, append_attend, attend, attend_torch

SHAPES = [  # query heads, kv heads, dim, value dim, key bits, value bits, group, value group
    (9, 3, 64, 64, 2, 1, 128, 64),
    (2, 2, 32, 32, 1, 2, 32, 16),
    (4, 1, 80, 80, 4, 4, 16, 80),
    (8, 1, 128, 128, 8, 8, 64, 32),
    (6, 2, 64, 32, 2, 2, 48, 32),
    (1, 1, 256, 256, 8, 8, 128, 256),
    (2, 1, 20, 48, 1, 1, 128, 48),
]
COUNTS = [  # tokens, sink, quantised keys, quantised values: keys are rounded to whole groups
    (1500, 0, 1400, 1371),
    (700, 4, 256, 513),
    (300, 0, 0, 0),
    (129, 0, 128, 0),
    (900, 300, 384, 410),
    (1, 0, 0, 0),
]


def numbers(x: Tensor, meta: str, per_block: int) -> Any:
    """``x`` ``[heads, n, m]`` float32 as the record holds it."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if meta in dtypes:
        return x.to(dtypes[meta])
    bits = {"int8": 8, "int4": 4}[meta]
    heads, n, m = x.shape
    rows = torch.nn.functional.pad(x, (0, 0, 0, -n % per_block)).reshape(heads, -1, per_block * m)
    coded = quant.quantise(rows, bits)
    return Coarse(quant.pack(coded.codes, bits), coded.scale.half(), coded.zero.half(), bits, m)


def layer_of(
    shape: tuple[int, ...],
    counts: tuple[int, ...],
    dtype: torch.dtype,
    meta: str = "fp16",
    seed: int = 0,
) -> PackedLayer:
    """A record made by ops/quant.py, in buffers with room to spare."""
    _, heads, dim, value_dim, key_bits, value_bits, group, value_group = shape
    tokens, sink, keys, values = counts
    g = torch.Generator().manual_seed(seed)
    keys = keys // group * group
    k = torch.randn(heads, tokens, dim, generator=g).to(dtype)
    v = torch.randn(heads, tokens, value_dim, generator=g).to(dtype)
    kc = quant.quantise(quant.key_groups(k[:, sink : sink + keys], group), key_bits, 0.1)
    vc = quant.quantise(quant.value_groups(v[:, sink : sink + values], value_group), value_bits)
    room = -values % 128
    codes = torch.nn.functional.pad(vc.codes.flatten(-2), (0, 0, 0, room))

    def tail(x: Tensor, first: int) -> Tensor:
        buffer = torch.full((heads, tokens - first + 5, x.shape[2]), torch.nan, dtype=dtype)
        buffer[:, : tokens - first] = x[:, first:]
        return buffer

    return PackedLayer(
        key_codes=quant.key_lines(quant.from_key_groups(kc.codes), key_bits),
        key_bits=key_bits,
        key_scale=numbers(kc.scale, meta, 1),
        key_zero=numbers(kc.zero, meta, 1),
        key_tokens=keys,
        value_codes=quant.value_lines(codes, value_bits),
        value_bits=value_bits,
        value_scale=numbers(vc.scale, meta, 128),
        value_zero=numbers(vc.zero, meta, 128),
        value_tokens=values,
        group=group,
        value_group=value_group,
        k_tail=tail(k, sink + keys),
        v_tail=tail(v, sink + values),
        k_sink=k[:, :sink].clone(),
        v_sink=v[:, :sink].clone(),
        length=tokens,
    )


def by_dense(layer: PackedLayer, q: Tensor, scale: float) -> Tensor:
    """Softmax attention in float64 over the dequantised keys and values."""
    k, v = (x.double() for x in packed.dense(layer))
    n, heads, _ = q.shape
    ratio = heads // k.shape[0]
    score = torch.einsum("nhd,hmd->hnm", q.double(), k.repeat_interleave(ratio, 0)) * scale
    seen = torch.arange(layer.length) <= torch.arange(layer.length - n, layer.length)[:, None]
    p = score.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hnm,hmd->nhd", p, v.repeat_interleave(ratio, 0))


def queries(shape: tuple[int, ...], n: int) -> Tensor:
    return torch.randn(n, shape[0], shape[2], generator=torch.Generator().manual_seed(n))


def few_rows(layer: PackedLayer) -> int:
    """The most rows whose own tokens all lie in the dense tails, up to 5."""
    stored = layer.sink + max(layer.key_tokens, layer.value_tokens)
    return min(5, layer.length - stored + 1, layer.length)


def test_dense_is_what_was_quantised() -> None:
    """The record's dense form by the arithmetic of the sheet, written out once more."""
    shape, counts = (2, 2, 32, 32, 2, 1, 32, 16), (200, 3, 128, 150)
    k, v = packed.dense(layer_of(shape, counts, torch.float32, "fp32"))
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 200, 32, generator=g) for _ in range(2))
    for h, t, d in [(0, 3, 0), (1, 70, 31), (1, 130, 5), (0, 34, 17)]:
        first = 3 + (t - 3) // 32 * 32
        column = x[h, first : first + 32, d]
        low, step = column.min(), (column.max() - column.min()) / 3
        code = ((x[h, t, d] - low) / step).round()
        expected = code * step * 0.8 + low + 0.1 * step * 3
        torch.testing.assert_close(k[h, t, d], expected, rtol=1e-5, atol=1e-6)
        row = y[h, t, d // 16 * 16 : d // 16 * 16 + 16]
        middle = (row.max() - row.min()) / 2 + row.min()
        expected = row.max() if y[h, t, d] > middle else row.min()
        torch.testing.assert_close(v[h, t, d], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(k[:, :3], x[:, :3])
    assert torch.equal(k[:, 131:], x[:, 131:])
    assert torch.equal(v[:, 153:], y[:, 153:])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition_equals_dense_attention(
    shape: tuple[int, ...], counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "BLOCK", 200)
    monkeypatch.setattr(packed, "ROWS", 3)
    layer = layer_of(shape, counts, torch.float32)
    q = queries(shape, few_rows(layer))
    got = attend_torch(layer, q, 0.2)
    torch.testing.assert_close(got.double(), by_dense(layer, q, 0.2), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(native.library() is None, reason=native.status())
class TestKernel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("counts", COUNTS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equals_dense_attention(
        self, shape: tuple[int, ...], counts: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        layer = layer_of(shape, counts, dtype)
        for n in {1, few_rows(layer)}:
            q = queries(shape, n)
            assert packed.implementation(layer, q) in ("int8", "floats")
            got = attend(layer, q, 0.2)
            bound = 1e-5 if dtype is torch.float32 else 1e-3
            expected = by_dense(layer, q, 0.2)
            torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)

    def test_float32_caches_keep_their_precision(self) -> None:
        layer = layer_of(SHAPES[0], COUNTS[0], torch.float32)
        assert packed.implementation(layer, queries(SHAPES[0], 1)) == "floats"

    @pytest.mark.parametrize("meta", ["fp32", "bf16", "int8", "int4"])
    def test_kinds_of_metadata(self, meta: str) -> None:
        for shape in (SHAPES[0], SHAPES[1], SHAPES[4]):
            layer = layer_of(shape, COUNTS[1], torch.float32, meta)
            q = queries(shape, 3)
            got = attend(layer, q, 0.2)
            torch.testing.assert_close(got.double(), by_dense(layer, q, 0.2), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(attend_torch(layer, q, 0.2), got, rtol=1e-5, atol=1e-5)

    def test_float16_metadata_through_infinity_and_subnormals(self) -> None:
        layer = layer_of(SHAPES[0], COUNTS[0], torch.float32)
        odd = torch.tensor([6e-8, -3.1e-5, 65504.0, -0.0, 1.0])
        zero = layer.key_zero.clone()  # type: ignore[union-attr]
        zero[0, 0, :5] = odd.half()
        q = queries(SHAPES[0], 1) * 1e-4
        layer = dataclasses.replace(layer, key_zero=zero)
        got = attend(layer, q, 0.2)
        torch.testing.assert_close(got.double(), by_dense(layer, q, 0.2), rtol=1e-5, atol=1e-5)
        zero[0, 1, 2] = torch.inf
        assert attend(layer, q, 0.2)[:, :3].isnan().any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_up_to_the_limit_in_one_call(self, dtype: torch.dtype) -> None:
        for shape in (SHAPES[0], SHAPES[3]):
            layer = layer_of(shape, (1400, 2, 1152, 1271), dtype)
            q = queries(shape, packed.FEW)
            got = attend(layer, q, 0.2)
            expected = by_dense(layer, q, 0.2)
            bound = 1e-5 if dtype is torch.float32 else 5e-3
            torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_new_tokens_are_written_first(self, dtype: torch.dtype) -> None:
        layers = [layer_of(SHAPES[0], counts, dtype) for counts in (COUNTS[1], COUNTS[4])]
        q, spans = queries(SHAPES[0], 7), [(4, 7), (1, 3)]
        expected, got = torch.zeros(2, 7, 9, 64)
        placed = [x.at(a, b - a) for x, (a, b) in zip(layers, spans, strict=True)]
        append_attend(placed, q, None, 0.2, expected)
        k, v = torch.zeros(7, 3, 64), torch.zeros(7, 3, 64)
        for layer, (a, b) in zip(layers, spans, strict=True):
            tails = (layer.k_tail, layer.key_tokens, k), (layer.v_tail, layer.value_tokens, v)
            for tail, stored, x in tails:
                stop = layer.length - layer.sink - stored
                newest = tail[:, stop - (b - a) : stop]
                x[a:b] = newest.transpose(0, 1)
                newest.zero_()
        append_attend(placed, q, (k, v), 0.2, got)
        assert torch.equal(got, expected)
        assert not got[[0, 3]].any(), "rows of no layer"

    def test_many_sequences_in_one_call(self) -> None:
        layers, spans, at = [], [], 1
        for i, counts in enumerate([*COUNTS, (2000, 2, 1920, 1870)]):
            layers.append(layer_of(SHAPES[0], counts, torch.bfloat16, seed=i))
            n = few_rows(layers[-1])
            spans.append((at, at + n))
            at += n + 1
        wide = torch.randn(at, 20, 64)
        q = wide[:, :9]  # rows apart, as fused projections give them
        got = torch.empty(at, 9, 64)
        placed = [x.at(a, b - a) for x, (a, b) in zip(layers, spans, strict=True)]
        append_attend(placed, q, None, 0.2, got)
        for layer, (a, b) in zip(layers, spans, strict=True):
            expected = by_dense(layer, q[a:b], 0.2)
            torch.testing.assert_close(got[a:b].double(), expected, rtol=1e-3, atol=1e-3)

    def test_another_dtype_of_queries(self) -> None:
        layer = layer_of(SHAPES[0], COUNTS[0], torch.bfloat16)
        q = queries(SHAPES[0], 2).bfloat16()
        got = attend(layer, q, 0.2)
        assert got.dtype is torch.bfloat16
        expected = by_dense(layer, q, 0.2)
        torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)

    def test_large_and_tiny_numbers(self) -> None:
        """Peaked softmax, and coefficients over many orders of magnitude."""
        for factor in (0.0, 1e-20, 1e-3, 30.0):
            layer = layer_of(SHAPES[0], COUNTS[0], torch.bfloat16)
            q = queries(SHAPES[0], 1) * factor
            got = attend(layer, q, 1.0)
            expected = by_dense(layer, q, 1.0)
            torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nan_is_not_hidden(self, dtype: torch.dtype) -> None:
        good = layer_of(SHAPES[0], COUNTS[0], dtype)
        q = queries(SHAPES[0], 2)
        for bad in (torch.nan, torch.inf):
            spoilt = q.clone()
            spoilt[0, 4, 7] = bad
            out = attend(good, spoilt, 0.2)
            assert out[0, 4].isnan().all()
            assert out[0, 0].isfinite().all()
            assert out[1].isfinite().all()
        for name in ("key_scale", "key_zero", "value_scale", "value_zero", "k_tail", "v_tail"):
            numbers = getattr(good, name).clone()
            numbers[1, 0, 0] = torch.nan
            out = attend(dataclasses.replace(good, **{name: numbers}), q, 0.2)
            assert out[:, 3:6].isnan().any(-1).all(), name
            assert out[:, :3].isfinite().all(), name


class TestTriton:
    """The CUDA kernel, through Triton's interpreter."""

    @pytest.fixture(autouse=True)
    def _triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = pytest.importorskip("narrows.ops.packed_triton", exc_type=ImportError)
        monkeypatch.setattr(self.kernel, "SPLIT", 128)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("counts", [(290, 4, 256, 217), (40, 0, 0, 0), (150, 9, 128, 0)])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equals_dense_attention(
        self, shape: tuple[int, ...], counts: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        layer = layer_of(shape, counts, dtype)
        n = few_rows(layer)
        q = queries(shape, n)
        got = self.kernel.attend(layer, q, 0.2)
        torch.testing.assert_close(got.double(), by_dense(layer, q, 0.2), rtol=1e-5, atol=1e-5)

    def test_coded_metadata_and_zero_points_alone(self) -> None:
        layer = layer_of(SHAPES[0], (290, 4, 256, 217), torch.float32, "int4")
        bare = dataclasses.replace(
            layer, key_codes=None, key_scale=None, value_codes=None, value_scale=None
        )
        q = queries(SHAPES[0], 2)
        for x in (layer, bare):
            got = self.kernel.attend(x, q, 0.2)
            torch.testing.assert_close(got.double(), by_dense(x, q, 0.2), rtol=1e-5, atol=1e-5)

    def test_nan_is_not_hidden(self) -> None:
        layer = layer_of(SHAPES[0], (290, 4, 256, 217), torch.float32)
        q = queries(SHAPES[0], 2)
        q[0, 4, 7] = torch.nan
        out = self.kernel.attend(layer, q, 0.2)
        assert out[0, 4].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_points_alone(dtype: torch.dtype) -> None:
    """A borrower fitted by the mean has no codes."""
    layer = dataclasses.replace(
        layer_of(SHAPES[0], COUNTS[1], dtype),
        key_codes=None,
        key_scale=None,
        value_codes=None,
        value_scale=None,
    )
    q = queries(SHAPES[0], 3)
    for got in (attend(layer, q, 0.2), attend_torch(layer, q, 0.2)):
        torch.testing.assert_close(got.double(), by_dense(layer, q, 0.2), rtol=1e-3, atol=1e-3)


def test_borrowed_codes_are_read_up_to_the_borrowers_own_tokens() -> None:
    """The owner may be a block ahead: its later codes must not count."""
    owner = layer_of(SHAPES[0], (1500, 0, 1408, 1403), torch.float32)
    own = layer_of(SHAPES[0], (1499, 0, 1280, 1399), torch.float32, seed=1)
    layer = dataclasses.replace(own, key_codes=owner.key_codes, value_codes=owner.value_codes)
    assert owner.key_codes is not None
    assert owner.value_codes is not None
    cut = dataclasses.replace(
        own,
        key_codes=owner.key_codes[:, : 1280 // 16],
        value_codes=owner.value_codes[:, : -(-1399 // 4)],
    )
    q = queries(SHAPES[0], 1)
    got = attend(layer, q, 0.2)
    torch.testing.assert_close(got.double(), by_dense(cut, q, 0.2), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, attend(own, q, 0.2), atol=1e-2)


def test_rows_must_lie_in_the_dense_tail() -> None:
    layer = layer_of(SHAPES[0], (1400, 0, 1280, 1399), torch.float32)
    attend(layer, queries(SHAPES[0], 2), 0.2)
    with pytest.raises(ValueError, match="smaller steps"):
        attend(layer, queries(SHAPES[0], 3), 0.2)


def test_without_a_compiler_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "library", lambda: None)
    layer = layer_of(SHAPES[0], COUNTS[0], torch.float32)
    q = queries(SHAPES[0], 2)
    assert packed.implementation(layer, q) == "torch"
    assert torch.equal(attend(layer, q, 0.2), attend_torch(layer, q, 0.2))


def test_shapes_the_kernel_does_not_take_use_the_definition() -> None:
    shape = (2, 1, 32, 32, 2, 2, 32, 8)  # value groups of half a line
    layer = layer_of(shape, COUNTS[0], torch.bfloat16)
    q = queries(shape, 2)
    assert packed.implementation(layer, q) == "torch"
    got = attend(layer, q, 0.2)
    torch.testing.assert_close(got.double(), by_dense(layer, q, 0.2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [attend_torch, attend])
def test_no_dense_copy_is_made(run: Any) -> None:
    """What decoding allocates is far below the dense cache, and does not grow with it."""
    peaks = []
    for tokens in (8192, 32768):
        layer = layer_of(SHAPES[0], (tokens, 0, tokens - 128, tokens - 128), torch.bfloat16)
        q = queries(SHAPES[0], 1)
        run(layer, q, 0.2)
        gc.collect()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            run(layer, q, 0.2)
        held = peak = 0
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak)
        dense = 2 * tokens * 3 * 64 * 2
        assert peak < dense / 2
    assert peaks[1] < peaks[0] * 1.5 + 10_000

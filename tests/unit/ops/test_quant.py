"""Codes of few bits against hand examples, statistics and their own inverses."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.ops import native, quant
from narrows.ops.fold import fold_value
from narrows.ops.quant import borrow, calibrate, dequantise, pack, quantise, unpack


def reconstructed(x: torch.Tensor, bits: int, eta: float) -> torch.Tensor:
    return dequantise(*quantise(x, bits, eta))


@given(st.sampled_from(quant.BITS), st.integers(1, 9), st.integers(0, 2**31))
def test_pack_round_trip(bits: int, words: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, words * 8), generator=g, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, words * bits)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", quant.BITS)
def test_bytes_are_those_of_int32_words_with_low_bits_first(bits: int) -> None:
    each = 32 // bits
    codes = torch.randint(0, 2**bits, (5, 4 * each), dtype=torch.uint8)
    codes[0] = 2**bits - 1  # all ones: the sign bit of a word
    words = torch.zeros((5, 4), dtype=torch.int64)
    for j in range(each):
        words |= codes[:, j::each].long() << (j * bits)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    assert torch.equal(pack(codes, bits), words.view(torch.uint8))


@given(st.sampled_from(quant.BITS), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_stored_order_round_trip(bits: int, heads: int, lanes: int, quads: int) -> None:
    keys = torch.randint(0, 2**bits, (heads, lanes * 16, quads * 4), dtype=torch.uint8)
    lines = quant.key_lines(keys, bits)
    assert lines.shape == (heads, lanes, quads, 8 * bits)
    assert torch.equal(quant.key_codes(lines, bits), keys)
    values = torch.randint(0, 2**bits, (heads, quads * 4, lanes * 16), dtype=torch.uint8)
    lines = quant.value_lines(values, bits)
    assert lines.shape == (heads, quads, lanes, 8 * bits)
    assert torch.equal(quant.value_codes(lines, bits), values)


def test_a_line_holds_what_the_kernels_expect() -> None:
    keys = torch.arange(16 * 4, dtype=torch.uint8).view(1, 16, 4)  # token * 4 + channel
    assert quant.key_lines(keys, 8).flatten().tolist() == list(range(64))
    values = torch.arange(4 * 16, dtype=torch.uint8).view(1, 4, 16)  # token * 16 + channel
    expected = [t * 16 + c for c in range(16) for t in range(4)]
    assert quant.value_lines(values, 8).flatten().tolist() == expected


def test_hand_example() -> None:
    x = torch.tensor([[-1.0, -0.2, 0.3, 1.0]])
    coded = quantise(x, 1, 1 / 6)
    assert coded.codes.tolist() == [[0, 0, 1, 1]]
    torch.testing.assert_close(coded.scale, torch.tensor([4 / 3]))
    torch.testing.assert_close(coded.zero, torch.tensor([-2 / 3]))
    coded = quantise(x, 2, 0.045)
    assert coded.codes.tolist() == [[0, 1, 2, 3]]
    torch.testing.assert_close(coded.scale, torch.tensor([0.606667]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(coded.zero, torch.tensor([-0.91]))
    torch.testing.assert_close(
        dequantise(*coded), torch.tensor([[-0.91, -0.303333, 0.303333, 0.91]]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.25, 0.5])
def test_levels_stay_inside_the_drawn_in_range(bits: int, eta: float) -> None:
    x = torch.randn(50, 32)
    low, high = x.aminmax(dim=-1, keepdim=True)
    back = reconstructed(x, bits, eta)
    edge = eta * (high - low)
    assert (back >= low + edge - 1e-5).all()
    assert (back <= high - edge + 1e-5).all()
    if eta == 0.5:
        torch.testing.assert_close(back, ((low + high) / 2).expand_as(back))


def test_calibration_uses_the_scale_as_it_was() -> None:
    scale, zero = calibrate(torch.tensor([2.0]), torch.tensor([1.0]), 2, 0.1)
    torch.testing.assert_close(scale, torch.tensor([1.6]))
    torch.testing.assert_close(zero, torch.tensor([1.0 + 0.1 * 2.0 * 3]))


def test_uniform_data_wants_a_quarter_at_one_bit_and_less_at_two() -> None:
    x = torch.rand(4000, 128, generator=torch.Generator().manual_seed(0))

    def error(bits: int, eta: float) -> float:
        return (reconstructed(x, bits, eta) - x).square().mean().item()

    one = [error(1, e) for e in (0.0, 0.05, 0.1, 0.15, 0.2, 0.245)]
    assert all(a > b for a, b in itertools.pairwise(one))
    grid = [i / 200 for i in range(101)]
    assert min(grid, key=lambda e: error(1, e)) == pytest.approx(0.25, abs=0.02)
    assert min(grid, key=lambda e: error(2, e)) == pytest.approx(0.068, abs=0.02)


@pytest.mark.parametrize("bits", [1, 2])
def test_an_owner_s_own_data_borrows_its_own_numbers(bits: int) -> None:
    x = torch.randn(20, 32)
    coded = quantise(x, bits, 0.1)
    scale, zero = borrow(coded.codes, x, bits, "minmax", 0.1)
    assert torch.equal(scale, coded.scale)
    assert torch.equal(zero, coded.zero)


def test_a_scaled_and_shifted_copy_borrows_well_and_a_mirrored_one_only_by_least_squares() -> None:
    x = torch.randn(200, 32)
    codes = quantise(x, 2).codes

    def error(y: torch.Tensor, fit: str) -> float:
        back = dequantise(codes, *borrow(codes, y, 2, fit))  # type: ignore[arg-type]
        return ((back - y).square().mean() / y.var()).item()

    doubled = 2.0 * x + 1.0
    own = reconstructed(doubled, 2, 0.0)
    torch.testing.assert_close(dequantise(codes, *borrow(codes, doubled, 2, "minmax")), own)
    mirrored = -x
    assert error(mirrored, "minmax") > 1.0
    assert error(mirrored, "lsq") < 0.2


@given(st.integers(0, 2**31))
def test_least_squares_is_never_worse_than_the_mean(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 4, (30, 32), generator=g, dtype=torch.uint8)
    codes[0] = 2  # without variance there is nothing to fit
    x = torch.randn(30, 32, generator=g)
    errors = {}
    for fit in ("lsq", "mean"):
        scale, zero = borrow(codes, x, 2, fit)  # type: ignore[arg-type]
        errors[fit] = (dequantise(codes, scale, zero) - x).square().mean(-1)
    assert (errors["lsq"] <= errors["mean"] + 1e-5).all()


def test_neighbouring_codes_of_independent_tensors_agree_by_chance() -> None:
    """The statistic offered for similarity between layers is what independence gives."""
    g = torch.Generator().manual_seed(1)
    a, b = (quantise(torch.randn(20_000, 32, generator=g), 2).codes.int() for _ in range(2))
    assert ((a - b).abs() <= 1).float().mean().item() == pytest.approx(0.816, abs=0.01)
    assert ((a >= 2) == (b >= 2)).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_groups_without_range_and_large_numbers() -> None:
    x = torch.stack([torch.full((32,), 3.5), torch.zeros(32), torch.full((32,), -1e30)])
    coded = quantise(x, 2, 0.045)
    assert (coded.codes == 0).all()
    assert torch.equal(dequantise(*coded), x)
    wide = torch.linspace(-1e30, 1e30, 32)[None]
    assert reconstructed(wide, 8, 0.0).isfinite().all()


def test_nan_shows_in_scale_and_zero() -> None:
    x = torch.randn(2, 32)
    x[1, 5] = float("nan")
    coded = quantise(x, 2)
    assert coded.scale[0].isfinite()
    assert coded.scale[1].isnan()
    assert coded.zero[1].isnan()


@pytest.mark.skipif(native.library() is None, reason=native.status())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("meta", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", quant.BITS)
@pytest.mark.parametrize("eta", [0.0, 0.045, 1 / 6])
def test_one_token_at_a_time_is_all_at_once(
    dtype: torch.dtype, meta: torch.dtype, bits: int, eta: float
) -> None:
    heads, tokens, dim, group = 3, 12, 32, 16
    x = (torch.randn(heads, tokens, dim) * 3).to(dtype)
    x[1, 4] = 0.25  # a group without range
    coded = quantise(quant.value_groups(x.float(), group), bits, eta)
    expected = quant.value_lines(coded.codes.flatten(-2), bits)
    lines = torch.zeros_like(expected)
    scale, zero = (torch.zeros(heads, tokens, dim // group, dtype=meta) for _ in range(2))
    tail = torch.zeros(heads, tokens + 3, dim, dtype=dtype)
    tail[:, :tokens] = x
    for t in range(tokens):
        assert torch.equal(tail[:, : tokens - t], x[:, t:])  # what comes later moves up
        assert fold_value(tail[:, : tokens - t], bits, eta, lines, scale, zero, t)
    assert torch.equal(lines, expected)
    assert torch.equal(scale, coded.scale.to(meta))
    assert torch.equal(zero, coded.zero.to(meta))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_one_token_that_is_not_finite_leaves_nothing_behind(bad: float) -> None:
    x = torch.randn(2, 1, 32)
    x[1, 0, 3] = bad
    lines = torch.zeros(2, 1, 2, 16, dtype=torch.uint8)
    scale, zero = (torch.zeros(2, 4, 2, dtype=torch.float16) for _ in range(2))
    assert not fold_value(x, 2, 0.0, lines, scale, zero, 0)
    assert not lines.any()
    assert not scale.any()

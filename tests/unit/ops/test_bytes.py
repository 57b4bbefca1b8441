"""Weights in bytes: what the kernel makes of them is what their definition does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.ops.forecast import in_bytes, linear_bytes_torch
from narrows.ops.native import library


def linear_bytes(x, coded, rows, bias=None):
    """By the kernel."""
    out = torch.empty(len(x), rows)
    library().linear_bytes(
        *(x.data_ptr(), coded.data_ptr(), None if bias is None else bias.data_ptr()),
        *(out.data_ptr(), len(x), rows, x.shape[1], torch.get_num_threads()),
    )
    return out


@pytest.mark.parametrize("inner", [1, 63, 64, 65, 200, 576])
@pytest.mark.parametrize("outer", [1, 15, 16, 17, 100])
def test_the_kernel_is_its_definition(outer, inner):
    generator = torch.Generator().manual_seed(outer * 1000 + inner)
    coded = in_bytes(torch.randn(outer, inner, generator=generator).bfloat16())
    bias = torch.randn(outer, generator=generator)
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 25):
        x = torch.randn(rows, inner, generator=generator)
        for added in (None, bias):
            mine = linear_bytes(x, coded, outer, added)
            theirs = linear_bytes_torch(x, coded, outer, added)
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_those_beside_it():
    coded, x = in_bytes(torch.randn(48, 130)), torch.randn(9, 130)
    whole = linear_bytes(x, coded, 48)
    for row in range(9):
        assert torch.equal(linear_bytes(x[row : row + 1], coded, 48)[0], whole[row])


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_rounding_costs_half_a_unit_of_each(seed, size):
    generator = torch.Generator().manual_seed(seed)
    w, x = (size * torch.randn(n, 96, generator=generator) for n in (20, 3))
    made = linear_bytes(x, in_bytes(w), 20)
    off_x, off_w = (y.abs().amax(1) / 254 for y in (x, w))
    # |x w - x' w'| <= |x - x'| |w| + |x'| |w - w'|, summed
    bound = off_x[:, None] * w.abs().sum(1) + (x.abs().sum(1) + 96 * off_x)[:, None] * off_w
    assert ((made - x @ w.T).abs() <= 1.001 * bound + 1e-6).all()


@pytest.mark.parametrize("linear", [linear_bytes, linear_bytes_torch])
def test_nothing_stays_nothing_and_nan_stays_nan(linear):
    coded = in_bytes(torch.zeros(20, 70))
    assert not linear(torch.randn(2, 70), coded, 20).any()
    coded = in_bytes(torch.randn(20, 70))
    x = torch.zeros(3, 70)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    made = linear(x, coded, 20)
    assert not made[0].any()
    assert made[1:].isnan().all()
    weight = torch.randn(20, 70)
    weight[3] = torch.nan
    made = linear(torch.randn(2, 70), in_bytes(weight), 20)
    assert made[:, 3].isnan().all()
    assert made[:, :3].isfinite().all()

"""Attention with column sums against a dense softmax over the whole score matrix."""

import pytest
import torch

from narrows.ops.attention import causal_attention, visible
from narrows.ops.blocked import blocked_attention


def dense(q, k, v, scale, window):
    """Output and column sums from the full ``[heads, n, n]`` weights, keys repeated."""
    n, repeat = q.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    scores[:, ~visible(0, n, n, window, q.device)] = float("-inf")
    weights = scores.softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v), weights.sum((0, 1))


def qkv(n, heads=4, groups=2, d=8, dv=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)

    def rand(h, e):  # heads first, seen token-major: as a model hands it over
        return torch.randn(h, n, e, generator=generator, dtype=torch.float64).to(dtype)

    return tuple(x.transpose(0, 1) for x in (rand(heads, d), rand(groups, d), rand(groups, dv)))


@pytest.mark.parametrize("block_rows", [1, 3, 16, 37, 64])
@pytest.mark.parametrize("window", [None, 1, 5, 36, 200])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_equals_dense(block_rows, window, heads, groups):
    q, k, v = qkv(37, heads, groups)
    mass = torch.zeros(37)
    out = blocked_attention(q, k, v, 0.3, mass, window, block_rows)
    expected, columns = dense(q, k, v, 0.3, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass.double(), columns, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 7])
def test_output_is_that_of_plain_attention(window):
    q, k, v = qkv(50)
    out = blocked_attention(q, k, v, 0.3, torch.zeros(50), window)
    plain = causal_attention(q, k.transpose(0, 1), v.transpose(0, 1), 0.3, window)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


def test_every_row_gives_one_unit_and_the_last_column_only_its_diagonal():
    q, k, v = qkv(20)
    mass = torch.zeros(20)
    blocked_attention(q, k, v, 0.3, mass)
    assert mass.sum().item() == pytest.approx(4 * 20, rel=1e-6)
    scores = torch.einsum("hd,jhd->hj", q[-1], k.repeat_interleave(2, 1)) * 0.3
    assert mass[-1].item() == pytest.approx(scores.softmax(-1)[:, -1].sum().item(), rel=1e-5)


def test_adds_to_what_is_there():
    q, k, v = qkv(9)
    once, twice = torch.zeros(9), torch.zeros(9)
    blocked_attention(q, k, v, 0.3, once)
    for _ in range(2):
        blocked_attention(q, k, v, 0.3, twice)
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_a_sink(dtype):
    """A column that takes nearly all weight of every row: 16-bit sums would saturate or stall."""
    n = 1500
    q, k, v = qkv(n, dtype=dtype)
    k = k.clone()
    q[..., 0], k[..., 0] = 5.0, 0.0
    k[0, :, 0] = 20.0
    mass = torch.zeros(n)
    out = blocked_attention(q, k, v, 0.3, mass)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    columns = dense(q, k, v, 0.3, None)[1]
    torch.testing.assert_close(mass.double(), columns, rtol=1e-4, atol=1e-6)


def test_huge_scores_stay_finite():
    q, k, v = qkv(30)
    mass = torch.zeros(30)
    out = blocked_attention(q * 1e4, k * 1e4, v, 1.0, mass)
    assert torch.isfinite(out).all()
    assert mass.sum().item() == pytest.approx(120, rel=1e-6)


@pytest.mark.parametrize("window", [None, 1, 5, 36, 200])
@pytest.mark.parametrize("block_rows", [1, 7, 64])
def test_newest_rows_after_a_past_are_those_of_the_whole(window, block_rows):
    q, k, v = qkv(37)
    mass = torch.zeros(37)
    out = blocked_attention(q[25:], k, v, 0.3, mass, window, block_rows)
    whole, both = torch.zeros(37), torch.zeros(25)
    expected = blocked_attention(q, k, v, 0.3, whole, window)
    blocked_attention(q[:25], k[:25], v[:25], 0.3, both, window)
    torch.testing.assert_close(out, expected[25:], rtol=1e-5, atol=1e-6)
    whole[:25] -= both
    torch.testing.assert_close(mass, whole, rtol=1e-4, atol=1e-5)


def test_query_heads_can_be_told_apart():
    q, k, v = qkv(37, heads=6, groups=2)
    mass = torch.zeros(6, 37)
    out = blocked_attention(q, k, v, 0.3, mass, window=9, block_rows=5)
    expected, columns = dense(q, k, v, 0.3, 9)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass.sum(0).double(), columns, rtol=1e-5, atol=1e-6)
    for head in range(6):
        alone = torch.zeros(37)
        one = q[:, head, None], *(x[:, head // 3, None] for x in (k, v))
        blocked_attention(*one, 0.3, alone, window=9)
        torch.testing.assert_close(mass[head], alone, rtol=1e-5, atol=1e-6)

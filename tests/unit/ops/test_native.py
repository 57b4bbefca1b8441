"""The compiled kernels against their definitions in plain torch."""

from __future__ import annotations

import pytest
import torch

from narrows.ops import native, ragged
from narrows.ops.attention import causal_attention

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.status())


def by_definition(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return getattr(native, name)(*arguments)


def rounds(inner: int) -> bool:
    """Whether products of so many columns round their activations to bfloat16 here."""
    return bool(native.library().bf16_dots()) and inner % 2 == 0


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 10, 13, 17, 23, 25, 31, 33, 60])
@pytest.mark.parametrize(
    ("out", "inner"), [(1, 1), (1, 2), (3, 17), (64, 48), (101, 63), (101, 62), (40, 576), (48, 96)]
)
def test_linear(rows: int, out: int, inner: int) -> None:
    g = torch.Generator().manual_seed(rows * out + inner)
    x = torch.randn(rows, inner, generator=g)
    weight = torch.randn(out, inner, generator=g).bfloat16()
    bias = torch.randn(out, generator=g)
    if rounds(inner):
        x = x.bfloat16().float()
    expected = x.double() @ weight.double().T
    got = native.linear(x, weight)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    biased = native.linear(x, weight, bias)
    torch.testing.assert_close(biased.double(), expected + bias, rtol=1e-5, atol=1e-4)


def test_rows_that_are_not_contiguous() -> None:
    """Their copy must live as long as the kernel reads it."""
    x, weight = torch.randn(3, 2 * 576)[:, ::2], torch.randn(64, 576).bfloat16()
    assert torch.equal(native.linear(x, weight), native.linear(x.clone(), weight))


def test_room_that_is_large_enough_is_used_and_no_other() -> None:
    x, weight = torch.randn(3, 70), torch.randn(40, 70).bfloat16()
    expected = native.linear(x, weight)
    for room, fits in (
        (torch.full((4, 40), 7.0), True),
        (torch.full((100,), 7.0, dtype=torch.float64), False),
        (torch.full((119,), 7.0), False),
    ):
        made = native.linear(x, weight, room=room)
        assert torch.equal(made, expected)
        assert (made.data_ptr() == room.data_ptr()) == fits
        assert bool((room.flatten()[120 if fits else 0 :] == 7).all())


@pytest.mark.parametrize(("out", "inner"), [(101, 62), (101, 63), (112, 64)])
def test_rows_do_not_depend_on_those_beside_them(out: int, inner: int) -> None:
    if not rounds(62):
        pytest.skip("this processor takes another kernel")
    x, weight = torch.randn(60, inner), torch.randn(out, inner).bfloat16()
    whole = native.linear(x, weight)
    for rows in (1, 2, 3, 4, 7, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29, 32, 33, 41):
        assert torch.equal(native.linear(x[:rows], weight), whole[:rows])


def test_what_lies_behind_a_weight_is_not_read() -> None:
    """Weights that are part of a wider tensor, with NaN before and behind them."""
    for out, inner in ((16, 64), (19, 62), (5, 33)):
        around = torch.full((out * inner + 200,), torch.nan, dtype=torch.bfloat16)
        weight = around[100 : 100 + out * inner].view(out, inner)
        weight.copy_(torch.randn(out, inner))
        for rows in (1, 9, 16, 20, 24, 28, 32):
            assert native.linear(torch.randn(rows, inner), weight).isfinite().all()


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("n", [1, 15, 48, 1000])
@pytest.mark.parametrize("with_delta", [False, True])
def test_add_rms_norm(m: int, n: int, with_delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = torch.randn(m, n), torch.randn(n)
    delta = torch.randn(m, n) if with_delta else None
    mine, theirs = h.clone(), h.clone()
    got = native.add_rms_norm(mine, delta, weight, 1e-6)
    expected = by_definition(monkeypatch, "add_rms_norm", theirs, delta, weight, 1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dim", [2, 16, 34, 128])
def test_norm_rotate(with_norm: bool, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(5, 7, dim)
    weight = torch.randn(dim) if with_norm else None
    angle = torch.randn(5, dim // 2).repeat(1, 2)
    mine, theirs = whole.clone(), whole.clone()
    native.norm_rotate_(mine[:, 1:4], weight, 1e-6, angle.cos(), angle.sin())
    by_definition(
        monkeypatch, "norm_rotate_", theirs[:, 1:4], weight, 1e-6, angle.cos(), angle.sin()
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine[:, 4:], whole[:, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [True, False])
def test_gather_rows(monkeypatch, kernels: bool, dtype: torch.dtype) -> None:
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    table, at = torch.randn(9, 21).to(dtype), torch.tensor([8, 0, 3, 3, 7])
    assert torch.equal(native.gather_rows(table, at), table.float()[at])
    assert torch.equal(native.gather_rows(table, at[::2]), table.float()[at[::2]])
    assert native.gather_rows(table, at[:0]).shape == (0, 21)
    for wrong in (9, -1):
        with pytest.raises(IndexError):
            native.gather_rows(table, torch.tensor([2, wrong]))


@pytest.mark.parametrize("n", [1, 15, 16, 40, 1000, 3001])
def test_row_maxima(n: int) -> None:
    x = torch.randn(7, n).round(decimals=1)  # with equals among them
    x[1] = -torch.inf
    x[2, n // 2] = torch.inf
    x[3, n - 1] = torch.nan
    x[4, n // 3 :] = torch.nan
    values, places = native.row_maxima(x)
    expected, first = x.max(dim=1)
    assert torch.equal(values.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
    for row in (0, 1, 2, 5, 6):
        assert places[row] == (x[row] == expected[row]).nonzero()[0, 0]
    assert torch.equal(places[3:5], first[3:5])


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (208, 96), (1040, 64), (50, 32), (64, 40)])
def test_linear_maxima_are_those_of_the_product(rows: int, n: int, k: int) -> None:
    """With equals, in parts of several threads too, infinities, NaN, and rows of them alone."""
    torch.manual_seed(n)
    x, weight = torch.randn(rows, k).round(), torch.randn(n, k).round().bfloat16()
    weight[n // 2 :] = weight[: n - n // 2].clone()
    x[rows // 2] = 0.0
    for wrong in ({}, {5: torch.nan}, {5: torch.inf}, {3: torch.nan, n - 2: torch.nan}):
        spoilt = weight.clone()
        for row, value in wrong.items():
            spoilt[row, 0] = value
        values, places = native.linear_maxima(x, spoilt)
        expected, first = native.row_maxima(native.linear(x, spoilt))
        assert torch.equal(values.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
        assert torch.equal(places, first)
    values, places = native.linear_maxima(torch.ones(rows, k), torch.full_like(weight, -torch.inf))
    assert (values == -torch.inf).all()
    assert not places.any()


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 17), (40, 1536)])
def test_silu_mul(m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(m, 2 * n) * 20
    expected = by_definition(monkeypatch, "silu_mul", x)
    torch.testing.assert_close(native.silu_mul(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(
    ("folded", "rows", "offset"), [(1, 1, 0), (3, 12, 0), (3, 33, 40), (2, 8, 15)]
)
def test_softmax_mass(
    dtype: torch.dtype,
    window: int | None,
    folded: int,
    rows: int,
    offset: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = offset + -(-rows // folded)
    scores = (torch.randn(2, rows, seen) * 4).to(dtype)
    mine, theirs = scores.clone(), scores.clone()
    mass, other = torch.ones(seen), torch.ones(seen)
    native.softmax_mass_(mine, folded, offset, window, mass)
    by_definition(monkeypatch, "softmax_mass_", theirs, folded, offset, window, other)
    rounding = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(mine, theirs, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(mass, other, rtol=1e-5, atol=1e-5)


def test_silu_and_norm_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(5, 2 * 33) * 5).bfloat16()
    expected = by_definition(monkeypatch, "silu_mul", x)
    torch.testing.assert_close(native.silu_mul(x), expected, rtol=1e-2, atol=1e-6)
    h, delta, weight = torch.randn(5, 33), torch.randn(5, 33).bfloat16(), torch.randn(33)
    mine, theirs = h.clone(), h.clone()
    got = native.add_rms_norm(mine, delta, weight, 1e-6, torch.bfloat16)
    other = by_definition(monkeypatch, "add_rms_norm", theirs, delta, weight, 1e-6, torch.bfloat16)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, other, rtol=1e-2, atol=1e-6)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 2, 16), (9, 3, 64), (10, 2, 32), (3, 3, 20), (16, 1, 64), (5, 1, 128), (4, 2, 96)],
)
def test_append_attend(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, dim: int
) -> None:
    g = torch.Generator().manual_seed(dim)
    lengths = [(1, 1), (700, 1), (3, 3), (513, 4), (256, 2), (900, 13)]  # (stored, of them new)
    total = sum(n for _, n in lengths) + 2  # two rows that belong to nobody
    qkv = torch.randn(total, heads + 2 * kv_heads, dim, generator=g)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    places: dict[str, list[ragged.Place]] = {"fast": [], "slow": []}
    row = 1
    for stored, new in lengths:
        buffers = torch.randn(2, kv_heads, stored + 9, dim, generator=g).to(dtype)
        for kind in places:
            copy = buffers.clone()
            places[kind].append(ragged.Place(*copy, stored, row, new, window=window))
        row += new
    fast, slow = torch.zeros(2, *q.shape)
    ragged.append_attend(places["fast"], q, k, v, 0.3, fast)
    if dtype is torch.bfloat16 and dim % 32 == 0 and native.library().bf16_dots():
        q = q.bfloat16().float()  # weights are rounded there, too
        rtol, atol = 1e-2, 1e-2
    else:
        rtol, atol = 1e-4, 1e-5
    ragged.append_attend_torch(places["slow"], q, k, v, 0.3, slow)
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=atol)
    for a, b in zip(places["fast"], places["slow"], strict=True):
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)


@pytest.mark.parametrize("window", [None, 300])
def test_a_row_attends_alike_whatever_the_rows_beside_it(window: int | None) -> None:
    rows = 13
    qkv = torch.randn(rows, 9 + 3 + 3, 64)
    q, k, v = qkv.split([9, 3, 3], dim=1)
    buffers = torch.randn(2, 3, 600, 64).bfloat16()
    together = ragged.Place(*buffers.clone(), 509 + rows, 0, rows, window=window)
    whole, one = torch.zeros(2, *q.shape)
    ragged.append_attend([together], q, k, v, 0.3, whole)
    for row in range(rows):
        alone = ragged.Place(*buffers, 510 + row, row, 1, window=window)
        ragged.append_attend([alone], q, k, v, 0.3, one)
        assert torch.equal(one[row], whole[row])


def test_nan_is_not_hidden() -> None:
    x = torch.full((1, 32), float("nan"))
    assert native.linear(x, torch.ones(4, 32).bfloat16()).isnan().all()
    assert native.add_rms_norm(x, None, torch.ones(32), 1e-6).isnan().all()


@pytest.mark.parametrize("window", [None, 1, 40, 600])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 50), (300, 300), (300, 555), (40, 700)])
def test_causal_attention_equals_the_masked_softmax(n: int, m: int, window: int | None) -> None:
    q, k, v = torch.randn(n, 4, 8), torch.randn(2, m, 8), torch.randn(2, m, 6)
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
    seen = (j <= i) if window is None else (j <= i) & (j > i - window)
    scores = torch.einsum("nhd,hmd->hnm", q, k.repeat_interleave(2, 0)) * 0.4
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("hnm,hmd->nhd", p, v.repeat_interleave(2, 0))
    got = causal_attention(q, k, v, 0.4, window)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got = causal_attention(q, k, v, 0.4, window, torch.bfloat16)
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)

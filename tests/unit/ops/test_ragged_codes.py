"""The kernel for few new tokens over codes and masks, against its definition."""

from __future__ import annotations

import pytest
import torch

from narrows.cache.codebook import Codebook, Rule
from narrows.ops.native import library
from narrows.ops.ragged import Place, append_attend, append_attend_torch
from tiny import pair


def place(seed: int, dtype: torch.dtype, coded: tuple[int, int], dense: int, masked: int, rows: int,
          first: int) -> Place:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    books = []
    for side, n in enumerate(coded):
        book = Codebook(Rule(0.7, 64), pair("llama")[0].rotary if side == 0 else None)
        x = torch.randn(8, 16, generator=g).repeat(n // 8 + 1, 1)[:n]
        x = (x + 0.2 * torch.randn(n, 16, generator=g)).to(dtype)
        if n:
            book.extend(x, torch.randperm(1000, generator=g)[:n].sort().values)
        books.append(book.codes() if n else None)
    most = max(coded) + dense + rows
    buffers = [torch.randn(1, most - n, 16, generator=g).to(dtype) for n in coded]
    seen = None
    if masked:
        seen = torch.randint(0, 8, (masked,), generator=g, dtype=torch.int16)
    return Place(*buffers, most, first, rows, *books, seen)


def float_copy(p: Place) -> Place:
    return Place(
        p.k.float(), p.v.float(), p.stored, p.first_row, p.rows, p.k_codes, p.v_codes, p.seen
    )


@pytest.mark.skipif(library() is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coded", [(0, 0), (40, 0), (0, 40), (300, 270), (600, 256)])
@pytest.mark.parametrize("masked", [0, 33, 290])
def test_kernel_equals_definition(dtype, coded, masked):
    places, first = [], 0
    for seed, rows in enumerate((1, 3)):
        masked = min(masked, max(coded) + 20)
        places.append(place(seed, dtype, coded, 20, masked, rows, first))
        first += rows
    g = torch.Generator().manual_seed(9)
    q = torch.randn(first, 3, 16, generator=g)
    k, v = (torch.randn(first, 1, 16, generator=g).to(dtype).float() for _ in range(2))
    before = [p.k.clone() for p in places]
    copies = [float_copy(p) for p in places]
    got, wanted = torch.zeros(2, first, 3, 16)
    append_attend(places, q, k, v, 0.25, got)
    append_attend_torch(copies, q, k, v, 0.25, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    for p, keys in zip(places, before, strict=True):
        assert torch.equal(p.k[0, -p.rows :], k[p.first_row : p.first_row + p.rows, 0].to(dtype))
        assert torch.equal(p.k[0, : -p.rows], keys[0, : -p.rows])


@pytest.mark.skipif(library() is None, reason="no compiler")
def test_a_query_head_that_sees_only_the_newest_token():
    p = place(0, torch.float32, (0, 0), 300, 300, 1, 0)
    p = Place(p.k, p.v, p.stored, 0, 1, seen=torch.full((300,), 0b101, dtype=torch.int16))
    q, k, v = torch.randn(1, 3, 16), torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    out = torch.empty(1, 3, 16)
    append_attend([p], q, k, v, 0.25, out)
    torch.testing.assert_close(out[0, 1], v[0, 0])
    assert torch.isfinite(out).all()

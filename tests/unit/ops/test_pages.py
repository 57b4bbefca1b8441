"""Tensors in huge pages."""

from __future__ import annotations

import mmap

import torch

from narrows.ops.pages import LINE, reserve


def test_reserved_tensors_are_apart_in_one_stretch():
    dtypes = [torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bfloat16]
    shapes = [(8, 7), (1, 1), (1000, 300), (13,), (0, 4)]
    made = reserve(list(zip(shapes, dtypes, strict=True)))
    for number, one in enumerate(made):
        one.fill_(number)
    for number, (one, shape, dtype) in enumerate(zip(made, shapes, dtypes, strict=True)):
        assert (one.shape, one.dtype) == (shape, dtype)
        assert one.is_contiguous()
        assert (one == number).all(), "they do not overlap"
        assert one.data_ptr() % LINE == 0
    assert len({x.untyped_storage().data_ptr() for x in made}) == 1


def test_without_huge_pages_there_are_usual_ones(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    (one,) = reserve([((30, 40), torch.float64)])
    assert one.zero_().shape == (30, 40)
    assert reserve([]) == []

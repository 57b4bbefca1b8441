"""Tensors gathered in huge pages."""

from __future__ import annotations

import mmap

import pytest
import torch

from narrows.ops.pages import LINE, gathered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_gathered_tensors_are_the_given_ones_below_each_other(dtype):
    torch.manual_seed(0)
    sizes = [[(3, 7), (5, 7)], [(1, 1)], [(1000, 300)], [(13,)]]
    groups = [[(9 * torch.rand(size)).to(dtype) for size in group] for group in sizes]
    made = gathered(groups)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(made, groups, strict=True))
    assert all(x.is_contiguous() and x.data_ptr() % LINE == 0 for x in made)
    assert len({x.untyped_storage().data_ptr() for x in made}) == 1
    made[0].fill_(1)
    assert torch.equal(made[1], groups[1][0]), "they do not overlap"


def test_without_huge_pages_there_are_usual_ones(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert torch.equal(gathered([[torch.arange(9)]])[0], torch.arange(9))
    assert gathered([]) == []

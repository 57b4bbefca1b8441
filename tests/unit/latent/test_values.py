"""Smaller value heads."""

from __future__ import annotations

import pytest
import torch

from narrows.latent import values


def head(group: int = 2, hidden: int = 12, size: int = 8, inputs: int = 10) -> tuple:
    g = torch.Generator().manual_seed(1)
    value = torch.randn(size, inputs, dtype=torch.float64, generator=g)
    out = torch.randn(group, hidden, size, dtype=torch.float64, generator=g)
    root = torch.randn(inputs, inputs, dtype=torch.float64, generator=g)
    return value, out, root @ root.T


def lost(value, out, small, narrow, moment) -> float:
    gone = out @ value - narrow @ small
    return float(torch.einsum("ghi,ij,ghj->", gone, moment, gone))


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_projected_loses_what_the_smaller_singular_values_hold(kept: int) -> None:
    value, out, moment = head()
    small, narrow = values.projected(value, out, kept, moment)
    assert small.shape == (kept, 10)
    assert narrow.shape == (2, 12, kept)
    whole = (out @ value).flatten(0, 1) @ torch.linalg.cholesky(moment)
    least = torch.linalg.svdvals(whole)[kept:].square().sum()
    found = lost(value, out, small, narrow, moment)
    assert found == pytest.approx(float(least), rel=1e-6, abs=1e-8)


def test_projected_beats_the_stride_and_others_their_own_moment() -> None:
    value, out, moment = head()
    plain = torch.eye(10, dtype=torch.float64)
    seen = {m: values.projected(value, out, 4, w) for m, w in (("seen", moment), ("plain", plain))}
    stride = values.strided(value, out, 4)
    assert lost(value, out, *seen["seen"], moment) < lost(value, out, *seen["plain"], moment)
    assert lost(value, out, *seen["plain"], plain) < lost(value, out, *seen["seen"], plain)
    assert lost(value, out, *seen["plain"], plain) < lost(value, out, *stride, plain)


def test_stride_takes_rows_and_the_columns_that_read_them() -> None:
    value = torch.arange(8.0)[:, None].expand(8, 3)
    out = torch.arange(8.0).expand(2, 5, 8)
    small, narrow = values.strided(value, out, 4)
    assert small[:, 0].tolist() == [0, 2, 4, 6]
    assert narrow[1, 2].tolist() == [0, 2, 4, 6]

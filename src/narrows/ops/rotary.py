"""Rotary embedding with the halves of a vector turned against each other, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``x`` ``[..., n, heads, dim]`` by tables ``[..., n, dim]``, in x's dtype."""
    cosine, sine = (table[..., None, :].to(x.dtype) for table in (cosine, sine))
    return x * cosine + _swapped(x) * sine


def turn_back(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """What ``turn`` made ``x`` of, but for rounding; also where the tables are scaled."""
    unscaled = cosine.square() + sine.square()
    return turn(x, cosine, -sine) / unscaled[..., None, :].to(x.dtype)


def _swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)

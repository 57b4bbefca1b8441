"""Which rotary pairs of queries and keys stay, and how queries make up for the others.

One choice is made for all heads and layers, since a model has one table of frequencies. A pair
``p`` is the numbers ``p`` and ``p + d_h / 2`` of a head; both stay or go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from narrows.errors import ConfigError
from narrows.latent.frequencies import frequency_aware_places
from narrows.latent.statistics import LayerStatistics

RIDGE = 1e-4
"""Of the mean diagonal, added to a fit's."""


def stride(pairs: int, kept: int) -> list[int]:
    """Every ``pairs / kept``-th pair (paper, formula 5); as even as can be where that is broken."""
    return [i * pairs // kept for i in range(kept)]


def frequency_matched(pairs: int, size: int) -> list[int]:
    """The pairs whose own frequencies are the frequency-aware ones of a head of ``size`` numbers
    (sheet section 4.3). Raises ConfigError where these lie between the base's."""
    places = frequency_aware_places(size, pairs)
    if any(place != int(place) for place in places):
        raise ConfigError(
            f"no pairs of a key head of {2 * pairs} have the frequency-aware frequencies of one of "
            f"{size}; choose a key size that is a half, a quarter, ... of it"
        )
    return [int(place) for place in places]


def by_energy(layers: Sequence[LayerStatistics], kept: int) -> list[int]:
    """The pairs of most energy, each layer's counted as a share of its own."""
    shares = torch.stack([layer.energy / layer.energy.sum() for layer in layers]).mean(0)
    return sorted(shares.topk(kept).indices.tolist())


def by_fit(layers: Sequence[LayerStatistics], kept: int) -> list[int]:
    """The pairs from which, each times a gain of its own in every query head, the logits of all
    can best be told; the least missed goes first, one by one. An extension."""
    moments = torch.cat([layer.pairs for layer in layers])
    left = list(range(moments.shape[-1] // 2))
    while len(left) > kept:
        inner, weights = _fit(moments, left)
        # What the fit loses without a pair, the others fitted anew: w' (inner^-1)_pp^-1 w over the
        # two weights of the pair, as in Optimal Brain Surgeon. One inverse serves all pairs.
        heads, count = len(inner), len(left)
        inverse = torch.linalg.inv(inner).view(heads, 2, count, 2, count)
        blocks = inverse.diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2)  # [heads, pairs, 2, 2]
        w = weights.view(heads, 2, count).transpose(1, 2)[..., None]
        lost = (w.transpose(2, 3) @ torch.linalg.solve(blocks, w)).sum((0, 2, 3))
        del left[int(lost.argmin())]
    return left


def gains(moments: Tensor, chosen: Sequence[int]) -> Tensor:
    """Complex gains ``[heads, kept]`` of the ``chosen`` pairs of queries that bring the logits
    nearest to those of all pairs, by ``LayerStatistics.pairs`` ``[heads, 2 pairs, 2 pairs]``."""
    real, imaginary = _fit(moments, chosen)[1].chunk(2, -1)
    return torch.complex(real, -imaginary)


def _fit(moments: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Second moments ``[heads, 2 * kept, 2 * kept]`` of the chosen pairs' parts, with a ridge, and
    their best weights ``[heads, 2 * kept]``; Re(a z) = Re a Re z - Im a Im z."""
    pairs = moments.shape[-1] // 2
    at = torch.tensor([*chosen, *(p + pairs for p in chosen)])
    inner = moments[:, at][:, :, at]
    ridge = RIDGE * inner.diagonal(dim1=1, dim2=2).mean(1)
    inner = inner + ridge[:, None, None] * torch.eye(len(at), dtype=inner.dtype)
    wanted = moments[:, at, :pairs].sum(-1)
    # The ridge pulls towards the pairs as they are, not towards none.
    start = torch.cat([torch.ones(len(chosen)), torch.zeros(len(chosen))]).to(inner)
    return inner, torch.linalg.solve(inner, wanted + ridge[:, None] * start)

"""Which pairs stay, and the gains that make up for the others."""

from __future__ import annotations

import torch

from narrows.latent import selection
from narrows.latent.statistics import LayerStatistics


def moments(heads: int = 3, pairs: int = 8, rank: int = 16, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, 400, rank, dtype=torch.float64, generator=g)
    x = x @ torch.randn(heads, rank, 2 * pairs, dtype=torch.float64, generator=g)
    return x.transpose(1, 2) @ x


def layer(found: torch.Tensor) -> LayerStatistics:
    return LayerStatistics(found[0], found[0, :8, 0].abs(), found)


def missed(found: torch.Tensor, chosen: list[int]) -> float:
    """Least squares, literally: from a square root of the moments back to samples."""
    pairs, total = found.shape[-1] // 2, 0.0
    for head in found:
        values, vectors = torch.linalg.eigh(head)
        samples = values.clamp(min=0).sqrt()[:, None] * vectors.T
        wanted = samples[:, :pairs].sum(1, keepdim=True)
        parts = samples[:, [*chosen, *(p + pairs for p in chosen)]]
        told = parts @ torch.linalg.lstsq(parts, wanted).solution
        total += float((wanted - told).square().sum())
    return total


def test_the_pair_least_missed_goes_first() -> None:
    found = moments()
    left = list(range(8))
    while len(left) > 3:
        losses = [missed(found, [p for p in left if p != gone]) for gone in left]
        del left[losses.index(min(losses))]
    assert selection.by_fit([layer(found)], 3) == left


def test_gains_are_the_best_and_one_where_all_pairs_stay() -> None:
    found = moments()
    every = selection.gains(found, range(8))
    torch.testing.assert_close(every, torch.ones_like(every), rtol=0, atol=1e-9)
    chosen = [0, 3, 5]
    gain = selection.gains(found, chosen)
    weights = torch.cat([gain.real, -gain.imag], 1)
    at = [*chosen, *(p + 8 for p in chosen)]
    wanted = found[:, at, :8].sum(-1)
    slope = (found[:, at][:, :, at] @ weights[..., None])[..., 0] - wanted
    assert (slope.abs() < 1e-2 * wanted.abs().mean()).all()  # but for the ridge


def test_a_pair_of_great_energy_stays() -> None:
    told = layer(moments())
    told.energy = torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6])
    assert selection.by_energy([told, told], 3) == [1, 3, 5]


def test_stride_is_as_even_as_can_be() -> None:
    assert selection.stride(8, 4) == [0, 2, 4, 6]
    assert selection.stride(8, 3) == [0, 2, 5]
    assert selection.stride(8, 8) == list(range(8))

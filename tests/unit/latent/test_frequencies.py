"""Rotary frequencies of smaller heads; sheet section 12, oracles 3, 4, 6 and 7."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import ConfigError
from narrows.latent.frequencies import frequency_aware_places, read_off, rope_parameters
from narrows.latent.selection import frequency_matched, stride
from narrows.ops.rotary import turn


def table(size: int, theta: float = 1e4) -> torch.Tensor:
    return theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def exponents(size: int) -> list[float]:
    return [place / (size / 2) for place in frequency_aware_places(size, size // 2)]


def rotate(x: torch.Tensor, place: int, frequencies: torch.Tensor) -> torch.Tensor:
    angles = torch.cat([place * frequencies] * 2)[None]
    return turn(x[None, None], angles.cos(), angles.sin())[0, 0]


def test_frequency_aware_set_of_a_head_of_16() -> None:
    wanted = [0.25, 0.375, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375]
    assert exponents(16) == wanted


@pytest.mark.parametrize("size", [8, 32, 64, 128])
def test_frequency_aware_set_leaves_out_the_fastest_and_doubles_the_slowest(size: int) -> None:
    found = exponents(size)
    assert len(found) == size // 2
    assert found[0] == 0.25
    assert found[-1] == 1 - 1 / size
    assert all(a < b for a, b in itertools.pairwise(found))


def test_sizes_that_have_no_such_set_are_refused() -> None:
    with pytest.raises(ConfigError, match="divisible by 4"):
        frequency_aware_places(10, 16)
    with pytest.raises(ConfigError, match="half, a quarter"):
        frequency_matched(32, 48)


def test_matched_pairs_have_the_frequency_aware_frequencies() -> None:
    assert frequency_matched(64, 64) == [*range(16, 48, 2), *range(48, 64)]
    assert frequency_matched(64, 32) == [*range(16, 48, 4), *range(48, 64, 2)]
    assert frequency_matched(32, 32) == [*range(8, 24, 2), *range(24, 32)]


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("kind", ["stride", "matched"])
def test_rotating_then_gathering_is_gathering_then_rotating(ratio: int, kind: str) -> None:
    size, kept = 128, 128 // ratio
    chosen = stride(64, kept // 2) if kind == "stride" else frequency_matched(64, kept)
    places = [float(p) for p in chosen]
    if kind == "matched":
        assert places == frequency_aware_places(kept, 64)
    at = torch.tensor([*chosen, *(p + 64 for p in chosen)])
    x = torch.randn(size, dtype=torch.float64)
    one = rotate(x, 977, table(size))[at]
    other = rotate(x[at], 977, read_off(table(size), places))
    assert (one - other).abs().max() < 1e-12


def test_a_stride_keeps_the_plain_frequencies_of_the_smaller_head() -> None:
    places = [float(p) for p in stride(32, 8)]
    torch.testing.assert_close(read_off(table(64), places), table(16), rtol=1e-13, atol=0)


@given(st.integers(1, 16), st.floats(1e3, 1e6))
def test_places_between_entries_follow_the_power_law(quarters: int, theta: float) -> None:
    """Of an unscaled table, wherever the places lie and whatever theta."""
    size = 4 * quarters
    found = read_off(table(64, theta), frequency_aware_places(size, 32))
    wanted = theta ** -torch.tensor(exponents(size), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frequencies", [table(32), read_off(table(32), exponents(32))])
def test_rotation_tells_only_distance(frequencies: torch.Tensor) -> None:
    q, k = torch.randn(2, 32, dtype=torch.float64)
    near = rotate(q, 17, frequencies) @ rotate(k, 5, frequencies)
    far = rotate(q, 1017, frequencies) @ rotate(k, 1005, frequencies)
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(rotate(q, 400, frequencies).norm(), q.norm())
    torch.testing.assert_close(rotate(q, 0, frequencies), q, rtol=0, atol=0)
    ones = torch.ones(32, dtype=torch.float64)
    torch.testing.assert_close(
        ones @ rotate(ones, 40, frequencies), 2 * (40 * frequencies).cos().sum()
    )


def test_self_similarity_of_the_two_sets() -> None:
    """Mean cosine at theta 1e4 and 64 numbers, sheet oracle 7."""
    aware = read_off(table(64), frequency_aware_places(64, 32))
    for frequencies, wanted in (
        (table(64), [0.9662, 0.6579, 0.5586, 0.2789, 0.0015]),
        (aware, [0.9996, 0.9661, 0.6576, 0.5335, 0.0225]),
    ):
        found = [(x * frequencies).cos().mean().item() for x in (1, 10, 100, 1000, 4000)]
        assert found == pytest.approx(wanted, abs=6e-5)


def test_longrope_factors_of_a_head_of_16() -> None:
    class Config:
        rope_parameters = {"rope_theta": 1e4}  # noqa: RUF012
        max_position_embeddings = 512

    aware = read_off(table(16), frequency_aware_places(16, 8))
    found = rope_parameters(Config, aware, 1.0)["short_factor"]
    assert found == pytest.approx([10, 10, 10, 10, 10, 5.623, 3.162, 1.778], abs=5e-4)

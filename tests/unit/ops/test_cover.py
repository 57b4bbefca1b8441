"""The greedy cover: its guarantees, a brute force, and the kernel against the definition."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.ops.cover import greedy_cover, greedy_cover_torch, likeness_graph, nearest


def vectors(seed: int, n: int, spread: float, dim: int = 6) -> torch.Tensor:
    """``n`` vectors around a few directions."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, dim, generator=g)
    picked = torch.randint(0, 4, (n,), generator=g)
    length = torch.rand(n, 1, generator=g) * 3 + 0.1
    return (centres[picked] + spread * torch.randn(n, dim, generator=g)) * length


@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0.5, 0.99), st.booleans())
def test_every_vector_is_like_its_entry_and_entries_are_unlike(seed, n, threshold, covered):
    x = vectors(seed, n, 0.4)
    owner = greedy_cover(likeness_graph(x, threshold), covered=covered)
    unit = x / x.norm(dim=1, keepdim=True)
    cosine = (unit * unit[owner]).sum(1)
    assert ((cosine > threshold - 1e-5) | (owner == torch.arange(n))).all()
    entries = owner.unique()
    error = (x - unit[owner] * x.norm(dim=1, keepdim=True)).norm(dim=1)
    assert (error <= math.sqrt(2 * (1 - threshold)) * x.norm(dim=1) + 1e-4).all()
    if not covered:
        assert torch.equal(owner[entries], entries)
        apart = unit[entries] @ unit[entries].T
        apart.fill_diagonal_(-1)
        assert (apart <= threshold + 1e-5).all()


@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 70), st.floats(0.1, 0.99))
def test_the_graph_has_the_pairs_that_are_alike(seed, n, dim, threshold):
    x = vectors(seed, n, 0.4, dim)
    x[seed % n] = 0
    graph = likeness_graph(x, threshold)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    cosine = unit @ unit.T
    right = (cosine > threshold).fill_diagonal_(True)
    clear = (cosine - threshold).abs() > 1e-5
    assert torch.equal(graph & clear, right & clear)
    assert torch.equal(graph, graph.T)
    assert graph.diagonal().all()


@given(st.integers(0, 10**6), st.integers(1, 150), st.integers(1, 150), st.integers(1, 70))
def test_the_nearest_is_the_most_alike(seed, n, m, dim):
    x, others = vectors(seed, n, 0.4, dim), vectors(seed + 1, m, 0.4, dim)
    others[m - m // 2 :] = others[: m // 2].clone()  # of equals the first counts
    best, index = nearest(x, others)
    cosine = torch.nn.functional.cosine_similarity(x[:, None].double(), others.double(), dim=-1)
    torch.testing.assert_close(best.double(), cosine.amax(1), rtol=0, atol=1e-5)
    chosen = cosine.gather(1, index[:, None])[:, 0]
    torch.testing.assert_close(chosen, cosine.amax(1), rtol=0, atol=1e-5)
    assert (index < m - m // 2).all()


@given(st.integers(0, 10**6), st.integers(1, 50), st.floats(0.3, 0.99), st.booleans())
def test_the_kernel_is_the_definition(seed, n, threshold, covered):
    graph = likeness_graph(vectors(seed, n, 0.5), threshold)
    weights = torch.randint(1, 5, (n,), generator=torch.Generator().manual_seed(seed))
    for weight in (None, weights):
        assert torch.equal(
            greedy_cover(graph, weight, covered), greedy_cover_torch(graph, weight, covered)
        )


@given(st.integers(0, 10**6), st.integers(1, 25), st.floats(0.3, 0.99))
def test_weights_are_copies(seed, n, threshold):
    """A weighted cover is the cover of the vectors written out as often as they weigh."""
    x = vectors(seed, n, 0.5)
    weights = torch.randint(1, 4, (n,), generator=torch.Generator().manual_seed(seed))
    written = torch.repeat_interleave(torch.arange(n), weights)
    owner = greedy_cover(likeness_graph(x, threshold), weights)
    # From the same graph, since products of other shapes round otherwise.
    unfolded = likeness_graph(x, threshold)[written][:, written]
    literal = greedy_cover(unfolded)
    assert torch.equal(written[literal], owner[written])


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 10), st.floats(0.3, 0.95))
def test_against_brute_force(seed, n, threshold):
    graph = likeness_graph(vectors(seed, n, 0.6), threshold)
    least = next(
        size
        for size in range(1, n + 1)
        if any(graph[list(c)].any(0).all() for c in itertools.combinations(range(n), size))
    )
    paper = len(greedy_cover(graph).unique())
    cover = len(greedy_cover(graph, covered=True).unique())
    assert least <= paper
    assert least <= cover <= least * (math.log(n) + 1)


def test_a_double_star_tells_the_two_rules_apart():
    k = 5  # two linked hubs with k leaves each
    n = 2 * k + 2
    graph = torch.eye(n, dtype=torch.bool)
    for a, b in [(0, 1), *((0, 2 + i) for i in range(k)), *((1, 2 + k + i) for i in range(k))]:
        graph[a, b] = graph[b, a] = True
    assert len(greedy_cover(graph).unique()) == k + 1
    assert len(greedy_cover(graph, covered=True).unique()) == 2


def test_special_vectors():
    same = torch.ones(7, 4)
    assert greedy_cover(likeness_graph(same, 0.98)).tolist() == [0] * 7
    assert greedy_cover(likeness_graph(torch.eye(5), 0.1)).tolist() == [0, 1, 2, 3, 4]
    scaled = torch.ones(3, 4) * torch.tensor([[1.0], [9.0], [0.25]])
    assert greedy_cover(likeness_graph(scaled, 0.98)).tolist() == [0, 0, 0]
    nothing = torch.zeros(3, 4)
    assert greedy_cover(likeness_graph(nothing, 0.98)).tolist() == [0, 1, 2]
    # Nothing is more than alike: a threshold of 1 merges nothing.
    assert greedy_cover(likeness_graph(same, 1.0)).tolist() == list(range(7))
    assert len(greedy_cover(torch.zeros((0, 0), dtype=torch.bool))) == 0

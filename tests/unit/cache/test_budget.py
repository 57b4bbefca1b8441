"""Which tokens a prompt keeps: schedules add up, choices keep what is rated best."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.cache.budget import choose, layer_counts

SHARES = st.floats(0.01, 1.0)


@given(
    st.sampled_from(["flat", "pyramid"]),
    SHARES,
    st.integers(1, 64),
    st.integers(1, 3000),
    st.integers(1, 40),
)
def test_schedules_keep_exactly_their_share(schedule, keep, window, tokens, layers):
    counts = layer_counts(schedule, keep, 0.05, window, tokens, layers)
    assert len(counts) == layers
    assert all(min(window, tokens) <= n <= tokens for n in counts)
    if tokens <= window or keep == 1.0:
        assert counts == [tokens] * layers
    else:
        assert sum(counts) == max(window * layers, round(keep * tokens * layers))
    assert counts == sorted(counts, reverse=True)


def test_the_pyramid_is_the_papers_line():
    # A context of 10,000 tokens behind a window of 1, so that shares read off as counts.
    def ends(keep):
        counts = layer_counts("pyramid", keep, 0.05, 1, 10001, 11)
        return (counts[0] - 1) / 10000, (counts[-1] - 1) / 10000

    assert ends(0.4) == pytest.approx((0.75, 0.05), abs=2e-3)
    assert ends(0.7) == pytest.approx((1.0, 0.4), abs=2e-3)
    assert ends(0.525) == pytest.approx((1.0, 0.05), abs=2e-3)  # where the two branches meet
    assert ends(0.5249) == pytest.approx(ends(0.5251), abs=2e-3)
    assert ends(0.03) == pytest.approx((0.03, 0.03), abs=2e-3)
    straight = layer_counts("pyramid", 0.4, 0.05, 1, 10001, 11)
    assert all(abs((a - b) - 700) <= 1 for a, b in pairwise(straight))


def test_the_released_pyramid_by_hand():
    # 500 kept on average: 25 in the last layer would be less than the window, so 64 are.
    counts = layer_counts("pyramidkv", 0.5, 20.0, 64, 1000, 30)
    assert counts[0] == 936
    assert counts[-1] == 64
    assert counts[1] == round(936 - 872 / 29)
    assert sum(counts) == pytest.approx(500 * 30, abs=30)
    # Twice the mean but a twentieth, when that fits the context.
    assert layer_counts("pyramidkv", 0.5, 20.0, 64, 4000, 3) == [3900, 2000, 100]
    # A last layer below the window is the released code's cue to drop the pyramid.
    assert layer_counts("pyramidkv", 0.1, 20.0, 64, 1000, 3) == [100, 100, 100]


def scores(seed, rows, tokens, ties=False):
    chance = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 5, (rows, tokens), generator=chance).float()
    return drawn if ties else torch.rand((rows, tokens), generator=chance)


def naive_best(values, count, forced):
    """The places of the greatest values, earlier ones first among equals."""
    order = sorted(range(len(values)), key=lambda i: (i not in forced, -values[i], i))
    return sorted(order[:count])


@given(
    st.integers(0, 10**6),
    st.integers(2, 60),
    st.integers(1, 60),
    st.integers(0, 3),
    st.integers(1, 6),
    st.sampled_from(["mean", "max", "layer"]),
    st.booleans(),
)
def test_shared_choices_keep_the_best_and_what_is_forced(
    seed, tokens, count, sinks, window, heads, ties
):
    rated = scores(seed, 6, tokens, ties)
    window = min(window, tokens)
    sinks = min(sinks, tokens - window)
    chosen = choose(rated, count, heads=heads, kv_heads=2, sinks=sinks, window=window)
    grouped = rated.view(2, 3, tokens)
    if heads == "max":
        shared = grouped.amax(1)
    else:
        shared = grouped.mean(1)
        if heads == "layer":
            shared = shared.mean(0, keepdim=True).repeat(2, 1)
    forced = {*range(sinks), *range(tokens - window, tokens)}
    size = min(tokens, max(count, window + sinks))
    for row, kept in zip(shared.tolist(), chosen.tokens, strict=True):
        assert kept.tolist() == naive_best(row, size, forced)
    assert chosen.seen is None


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 40), st.booleans())
def test_each_query_head_sees_its_own_choice(seed, tokens, count, ties):
    rated = scores(seed, 6, tokens, ties)
    chosen = choose(rated, count, heads="per_query_head", kv_heads=2, sinks=0, window=1)
    if chosen.seen is None:
        assert count >= tokens
        return
    for group in range(2):
        kept, seen = chosen.tokens[group].tolist(), chosen.seen[group]
        wanted = [naive_best(r, count, {tokens - 1}) for r in rated.view(2, 3, -1)[group].tolist()]
        assert kept == sorted(set().union(*wanted))
        for head in range(3):
            assert [t for t, s in zip(kept, seen[head].tolist(), strict=True) if s] == wanted[head]


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 40), st.booleans())
def test_a_union_is_exact_and_holds_what_every_head_ranks_best(seed, tokens, count, ties):
    rated = scores(seed, 6, tokens, ties)
    chosen = choose(rated, count, heads="union", kv_heads=2, sinks=0, window=1)
    for group in range(2):
        kept = set(chosen.tokens[group].tolist())
        assert len(kept) == min(tokens, count)
        for k in range(count):  # the union of everybody's best k, while it fits, is all there
            best = set()
            for row in rated.view(2, 3, -1)[group].tolist():
                best |= set(naive_best(row, k, {tokens - 1}))
            if len(best) <= count:
                assert best <= kept


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 40), st.floats(0.0, 1.0))
def test_adaptive_heads_share_one_budget_above_their_floor(seed, tokens, count, floor):
    rated = scores(seed, 2, tokens)
    chosen = choose(
        rated, count, heads="mean", kv_heads=2, sinks=0, window=1, adaptive=True, floor=floor
    )
    sizes = [len(t) for t in chosen.tokens]
    assert sum(sizes) == 2 * min(tokens, count)
    assert min(sizes) >= int(floor * min(tokens, count))
    if floor == 1.0:
        even = choose(rated, count, heads="mean", kv_heads=2, sinks=0, window=1)
        assert all(torch.equal(a, b) for a, b in zip(chosen.tokens, even.tokens, strict=True))


def test_adaptive_heads_take_what_scores_best_anywhere():
    rated = torch.tensor([[9.0, 8, 7, 6, 0], [1.0, 2, 3, 4, 0]])
    chosen = choose(rated, 3, heads="mean", kv_heads=2, sinks=0, window=1, adaptive=True, floor=0.7)
    assert [t.tolist() for t in chosen.tokens] == [[0, 1, 2, 4], [3, 4]]


@pytest.mark.parametrize("adaptive", [False, True])
def test_what_must_stay_stays_beyond_the_budget(adaptive):
    rated = scores(0, 2, 50)
    chosen = choose(
        rated, 6, heads="mean", kv_heads=2, sinks=4, window=8, adaptive=adaptive, floor=0.0
    )
    for kept in chosen.tokens:
        assert {*range(4), *range(42, 50)} == set(kept.tolist())

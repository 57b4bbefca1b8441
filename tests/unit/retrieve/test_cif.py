"""Integrate-and-fire: the closed form against the loop, and what it conserves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from narrows.retrieve.cif import fire, spans
from oracles.cif_reference import fire_one

BUCKETS = (0.5, 1.0, 2.0)
weighted = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40)


def one(weights, targets=None, **options):
    """Shares ``[N, T]`` of a single item."""
    a = torch.tensor([weights], dtype=torch.float64)
    if targets is not None:
        targets = torch.tensor([targets])
    return fire(a, torch.ones_like(a, dtype=torch.bool), targets, **options)


def test_the_papers_example():
    fired = one([0.8, 0.3, 0.4, 0.4, 0.1], tail="drop")
    expected = [[0.8, 0.2, 0, 0, 0], [0, 0.1, 0.4, 0.4, 0.1]]
    torch.testing.assert_close(fired.shares[0], torch.tensor(expected, dtype=torch.float64))
    assert one([0.8, 0.3, 0.4, 0.4, 0.1]).counts.tolist() == [2]


@given(weighted, st.sampled_from(BUCKETS))
def test_weight_is_conserved(weights, bucket):
    fired = one(weights, bucket=bucket, tail="drop")
    shares, total = fired.shares[0], sum(weights)
    count = int(fired.counts)
    torch.testing.assert_close(
        shares.sum(1), torch.full((count,), bucket, dtype=torch.float64), atol=2e-5, rtol=0
    )
    rest = total - count * bucket
    assert -2e-5 * bucket <= rest < bucket
    unfired = torch.tensor(weights, dtype=torch.float64) - shares.sum(0)
    assert unfired.min() > -1e-9
    assert float(unfired.sum()) == pytest.approx(rest, abs=1e-4)


@given(weighted, st.sampled_from(BUCKETS), st.sampled_from(["drop", "zero_frame", "rescale"]))
def test_closed_form_is_the_loop(weights, bucket, tail):
    total = sum(weights) / bucket
    limits = {"drop": 0.0, "zero_frame": 0.55, "rescale": 0.5}
    if min(abs(total % 1 - limits[tail]), 1 - total % 1, abs(total % 1)) < 1e-4:
        return  # on the very edge rounding decides
    states = torch.randn(len(weights), 3, dtype=torch.float64)
    rows, embeds = fire_one(weights, states.tolist(), bucket=bucket, tail=tail)
    fired = one(weights, bucket=bucket, tail=tail)
    assert int(fired.counts) == len(rows)
    shares = fired.shares[0]
    torch.testing.assert_close(
        shares, torch.tensor(rows, dtype=torch.float64).view_as(shares), atol=1e-9, rtol=0
    )
    made = torch.tensor(embeds, dtype=torch.float64).view(-1, 3)
    torch.testing.assert_close(shares @ states, made, atol=1e-8, rtol=0)


@given(weighted, st.integers(1, 120))
def test_a_target_fires_exactly_that_many_even_several_a_frame(weights, target):
    fired = one(weights, target)
    shares = fired.shares[0]
    assert fired.counts.tolist() == [target]
    torch.testing.assert_close(shares.sum(1), torch.ones(target, dtype=torch.float64))
    if sum(weights) > 0:
        scaled = [a * target / sum(weights) for a in weights]
        torch.testing.assert_close(
            shares.sum(0), torch.tensor(scaled, dtype=torch.float64), atol=1e-9, rtol=1e-6
        )
    assert float(fired.totals) == pytest.approx(sum(weights))


@pytest.mark.parametrize(("count", "each", "fired"), [(20, 0.05, 1), (31, 0.05, 2), (30, 0.05, 1)])
def test_tail_of_zero_frame(count, each, fired):
    assert one([each] * count).counts.tolist() == [fired]


def test_odd_shapes():
    assert one([0.0, 0.0, 0.0]).shares.shape == (1, 0, 3)
    assert one([1.0]).shares.tolist() == [[[1.0]]]
    assert one([3.5], tail="drop").shares[0].tolist() == [[1.0], [1.0], [1.0]]
    assert one([1.0] * 5).shares[0].tolist() == torch.eye(5).tolist()
    even = one([0.0, 0.0], 1)
    assert even.shares[0].tolist() == [[0.5, 0.5]]
    nobody = torch.zeros(0, 4)
    assert fire(nobody, nobody.bool()).shares.shape == (0, 0, 4)


@given(weighted, st.sampled_from(BUCKETS))
@example([1.0, 0.0, 1.0], 0.5)
def test_constant_states_and_times(weights, bucket):
    fired = one(weights, bucket=bucket, tail="drop")
    shares = fired.shares[0]
    frames = torch.arange(len(weights), dtype=torch.float64)
    assert (shares @ frames).diff().min() >= -1e-4 if len(shares) > 1 else True
    places = spans(fired.shares)[0].tolist()
    for (_, end), (start, _) in pairwise(places):
        assert end - 1 <= start
        assert sum(weights[end:start]) < 1e-5  # frames of no weight belong to nobody
    assert all(0 <= start < end <= len(weights) for start, end in places)


def test_tokens_of_a_target_cover_all_frames():
    fired = one([0.3, 0.9, 0.1, 0.6, 0.2], 7)
    places = spans(fired.shares)[0]
    assert places[0, 0] == 0
    assert places[-1, 1] == 5
    assert spans(torch.zeros(1, 2, 3)).tolist() == [[[0, 0], [0, 0]]]


def test_gradients():
    torch.manual_seed(0)
    a = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert gradcheck(lambda a, h: fire(a, mask).shares @ h, (a, h))
    targets = torch.tensor([4, 9])
    assert gradcheck(lambda a, h: fire(a, mask, targets).shares @ h, (a, h))


def test_all_tokens_together_pass_every_state_its_weight():
    """With the bucket that did not fire as one more row, the sum of tokens is that of weighted
    states, and its gradient by a weight is the state."""
    a = torch.rand(1, 9, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 9, 2, dtype=torch.float64)
    shares = fire(a, torch.ones_like(a, dtype=torch.bool), tail="drop").shares
    rest = a - shares.sum(1)
    total = (shares @ h).sum(1) + (rest[:, :, None] * h).sum(1)
    torch.testing.assert_close(total, (a[:, :, None] * h).sum(1))
    (grad,) = torch.autograd.grad(total[0, 0], a)
    torch.testing.assert_close(grad[0], h[0, :, 0])


def test_continuous_across_a_kink():
    h = torch.randn(4, 3, dtype=torch.float64)

    def first(x):
        return one([0.6, 0.4 + x, 0.5, 0.9], tail="drop").shares[0][0] @ h

    torch.testing.assert_close(first(-1e-9), first(1e-9), atol=1e-7, rtol=0)


@given(weighted, st.floats(0.1, 7))
def test_scale_changes_nothing_with_a_target(weights, factor):
    if sum(weights) < 1e-3:
        return
    same = one([factor * a for a in weights], 5).shares
    torch.testing.assert_close(same, one(weights, 5).shares, atol=1e-9, rtol=0)


def test_items_do_not_see_padding_or_each_other():
    torch.manual_seed(1)
    lengths = [7, 3, 11]
    a = torch.full((3, 11), float("nan"))
    for row, n in enumerate(lengths):
        a[row, :n] = torch.rand(n)
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    for targets in (None, torch.tensor([4, 5, 2])):
        many = fire(a, mask, targets)
        for row, n in enumerate(lengths):
            own = None if targets is None else targets[row : row + 1]
            alone = fire(a[row : row + 1, :n], mask[row : row + 1, :n], own)
            count = int(alone.counts)
            assert int(many.counts[row]) == count
            torch.testing.assert_close(
                many.shares[row, :count, :n], alone.shares[0], atol=1e-6, rtol=0
            )
            assert not many.shares[row, count:].any()
            assert not many.shares[row, :, n:].any()
            assert float(many.totals[row]) == pytest.approx(float(alone.totals))

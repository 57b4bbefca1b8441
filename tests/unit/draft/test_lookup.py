"""Prompt lookup against a plain search, and the choice of draft lengths."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.contracts import Draft
from narrows.draft.length import DraftLength, StepTime
from narrows.draft.specs import make_drafter
from narrows.errors import ConfigError


def search(tokens: list[int], k: int, longest: int, shortest: int) -> list[int]:
    """The tokens behind the latest earlier copy of the longest end of ``tokens`` that has one."""
    for size in range(longest, shortest - 1, -1):
        end = tokens[len(tokens) - size :]
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(end) == size and tokens[start : start + size] == end:
                return tokens[start + size : start + size + k]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    more=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=4),
    k=st.integers(0, 5),
    lengths=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
)
def test_lookup_is_a_search(tokens, more, k, lengths):
    longest, shortest = lengths
    drafter = make_drafter(f"lookup:longest={longest},shortest={shortest}")
    for extra in [[], *more]:
        tokens = tokens + extra
        expected = search(tokens, k, longest, shortest)
        assert drafter.propose(1, tokens, k).tokens == expected
    assert drafter.propose(2, [1], 3).tokens == []
    drafter.forget(1)
    assert drafter.propose(1, tokens, k).tokens == search(tokens, k, longest, shortest)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lookup:most=0", "most"),
        ("lookup:shortest=5", "shortest"),
        ("lookup:depth=3", "depth"),
        ("lokup", "lookup"),
        ("lookup:most", "option=value"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_drafter(spec)
    assert make_drafter("none") is None


FLAT = StepTime((1, 64), (1.0, 1.0), 0.0)
STEEP = StepTime((1, 64), (1.0, 64.0), 0.0)


def test_free_rows_take_every_guess_and_dear_ones_none():
    offers = [(i, Draft([1, 2, 3]), 10) for i in range(3)]
    assert DraftLength(FLAT).choose(offers, 3, 30) == [3, 3, 3]
    assert DraftLength(STEEP).choose(offers, 3, 30) == [0, 0, 0]


def test_the_choice_is_the_best_of_all_choices():
    for seed in range(10):
        seconds = (1.0, 1.1 + seed / 20, 1.6 + seed / 5)
        length = DraftLength(StepTime((1, 4, 9), seconds, 0.001 * seed))
        offers = [(i, Draft([1] * 3, kind=f"{i}"), 20) for i in range(3)]
        for number, draft, _ in offers:
            for _ in range(10):
                length.learn(number, draft, 3, (seed + number) % 4)

        def speed(ks, length=length, offers=offers):
            expected = 3.0
            for (number, draft, _), k in zip(offers, ks, strict=True):
                chance = 1.0
                for place in range(k):
                    chance *= length.survival(number, draft.kind, place)
                    expected += chance
            return expected / length.step_time(3 + sum(ks), 60 + 20 * sum(ks))

        chosen = length.choose(offers, 3, 60)
        best = max(itertools.product(range(4), repeat=3), key=speed)
        if any(chosen):
            assert speed(chosen) == pytest.approx(speed(best), rel=1e-6)
        else:
            assert speed(best) <= speed((0, 0, 0)) * 1.03 + 1e-9


def test_a_kind_that_fails_is_left_and_tried_again_later():
    length, draft = (
        DraftLength(StepTime((1, 2, 64), (1.0, 1.3, 20.0), 0.0)),
        Draft([5, 6], kind="x"),
    )
    tries = []
    for _ in range(600):
        (k,) = length.choose([(0, draft, 5)], 1, 5)
        tries.append(k)
        length.learn(0, draft, k, 0)
    assert tries[0] > 0
    assert tries[30] == 0
    assert 0 < sum(t > 0 for t in tries[50:]) < 60


def test_time_is_linear_between_and_beyond_the_rows_measured():
    t = StepTime((1, 4, 8), (1.0, 4.0, 6.0), 0.5)
    assert [t(r, 0) for r in (1, 2, 4, 6, 8, 12)] == [1.0, 2.0, 4.0, 5.0, 6.0, 8.0]
    assert t(1, 4) == 3.0

"""Drafts that come with chances: which are made, and which of their guesses are verified."""

from __future__ import annotations

import itertools
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.contracts import Offer
from narrows.draft.length import DRAFTS, DraftLength, _worth
from tiny_drafts import offer

TELLS = offer("x", 3, tells=True)


def told(*chances: float) -> Offer:
    return Offer("x", chances=chances, tokens=range(len(chances)))


def length_for(plain: float, a_row: float) -> DraftLength:
    """One that has seen steps of 1 to 40 rows."""
    made = DraftLength()
    for _ in range(30):
        for rows in range(1, 40, 3):
            made.steps.observe(rows, plain + a_row * rows)
    return made


def remember(length: DraftLength, *chances: float) -> None:
    for _ in range(DRAFTS):
        length.told(0, told(*chances))


def worth_making(length: DraftLength, asked: list[tuple[int, list[Offer]]]):
    """Beside what is best of the other offers."""
    others = [(number, [one for one in some if not one.tells]) for number, some in asked]
    rows = len(asked)
    return length.worth_making(asked, length.choose(others, rows, rows), rows, rows)


def test_what_is_sure_is_verified_and_what_is_not_is_left():
    length = length_for(1.0, 0.1)
    asked = [(0, [told(0.95, 0.95, 0.05)]), (1, [told(0.03, 0.95)]), (2, [told(0.85)])]
    assert length.choose(asked, 3, 3).lengths == [2, 0, 1]


def test_chances_are_what_became_of_those_told_alike():
    length = length_for(1.0, 0.1)
    assert length.chances(0, told(0.85))[0] == pytest.approx(0.85, abs=0.05)
    for _ in range(200):
        length.learn(0, told(0.82), 1, 0)
        length.learn(0, told(0.3, 0.3), 2, 2)
    assert length.chances(1, told(0.88))[0] < 0.05
    assert length.chances(1, told(0.95))[0] > 0.9
    assert length.chances(1, told(0.3, 0.3))[1] > 0.9


def test_prompts_read_in_the_same_step_make_no_guess_worth_more():
    """Their rows cost what they cost, whether or not a guess goes with them."""
    length = length_for(1.0, 0.1)
    for chances in ((0.9, 0.5, 0.2), (0.15,), (0.05, 0.9)):
        asked = [(number, [told(*chances)]) for number in range(3)]
        alone, beside = (length.choose(asked, rows, 3) for rows in (3, 300))
        assert beside.lengths == alone.lengths
        assert beside.speed == pytest.approx(alone.speed, rel=0.05)


@pytest.mark.parametrize(("a_row", "most"), [(0.0, 3), (0.1, 2), (0.2, 1), (0.5, 0)])
def test_a_guess_costs_what_rows_of_prompts_were_seen_to_add(a_row, most):
    """Whatever such a row would cost in steps that decode alone."""
    length = length_for(1.0, 0.1)
    for rows in (40, 300) * 5:
        length.read(3 + rows, 3, length.steps(3, 3) + a_row * rows)
    assert length.choose([(0, [told(0.9, 0.5, 0.2)])], 300, 3).lengths == [most]
    alone = length.choose([(0, [told(0.9, 0.5, 0.2)])], 3, 3).lengths
    assert alone == length_for(1.0, 0.1).choose([(0, [told(0.9, 0.5, 0.2)])], 3, 3).lengths


def test_the_better_of_two_drafts_is_taken():
    length = length_for(1.0, 0.01)
    for number, chances, kind in ((0, (0.9, 0.9), "x"), (1, (0.2,), "other")):
        (taken,) = length.choose([(number, [offer("other", 2), told(*chances)])], 1, 1).taken
        assert taken is not None
        assert taken.kind == kind


def test_drafts_are_made_where_the_latest_were_worth_it():
    """For a sequence that has nothing better, unless they were poor or are dear to make."""
    sure = offer("sure", 3, 0.97, 0.97)
    asked = [(0, [TELLS]), (1, [sure, TELLS]), (2, [])]
    for chances, making, made in (
        ((0.8, 0.8, 0.8), 0.01, [TELLS, None, None]),
        ((0.05, 0.8, 0.8), 0.01, [None] * 3),
        ((0.8, 0.8, 0.8), 3.0, [None] * 3),
    ):
        length = length_for(1.0, 0.1)
        remember(length, *chances)
        for _ in range(40):
            length.making["x"].observe(3, making)
        worth, price = worth_making(length, asked)
        assert worth == made
        assert 0.05 < price < 0.5


def test_a_new_sequence_is_a_new_chance():
    """Whose drafts may be better than those of the others; all of it where it is alone."""
    tells = offer("x", 3, 0.9, 0.9, tells=True)
    for count in (1, 8):
        length = length_for(1.0, 0.1)
        asked = [(number, [tells]) for number in range(count)]
        worth_making(length, asked)
        remember(length, 0.01)
        assert not any(worth_making(length, asked)[0])
        made = []
        for newest in range(count, 2 * count):
            asked = [*asked[1:], (newest, [tells])]
            made.append(any(worth_making(length, asked)[0]))
        assert made[-1]
        assert not any(made[: count // 2])


def test_without_offers_that_tell_nothing_is_made():
    length = length_for(1.0, 0.1)
    assert worth_making(length, [(0, [offer("y", 2)]), (1, [])])[0] == [None, None]
    assert worth_making(length, [])[0] == []


@given(st.lists(st.floats(0, 1), max_size=6), st.floats(0, 1))
def test_what_guesses_give_beyond_their_price_is_the_best_of_all_lengths(rates, price):
    chances = list(itertools.accumulate(rates, operator.mul))
    best = max(itertools.accumulate((chance - price for chance in chances), initial=0.0))
    assert _worth(chances, price) == pytest.approx(best, abs=1e-12)

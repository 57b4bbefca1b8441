"""Prompt lookup against a plain search, and the choice of draft lengths."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.contracts import Asked, Offer, Sort
from narrows.draft.learnt import FIRST, Times
from narrows.draft.length import CAUTION, GAIN, WORTH, DraftLength
from narrows.draft.lookup import EXPECTED
from narrows.draft.specs import make_drafter
from narrows.errors import ConfigError
from narrows.ops.ngrams import ALIKE, APART, ONCE
from tiny_drafts import offer


def search(tokens: list[int], k: int, longest: int, shortest: int) -> list[int]:
    """The tokens behind the latest earlier copy of the longest end of ``tokens`` that has one."""
    for size in range(longest, shortest - 1, -1):
        end = tokens[len(tokens) - size :]
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(end) == size and tokens[start : start + size] == end:
                return tokens[start + size : start + size + k]
    return []


def guesses(drafter, number: int, tokens: list[int], k: int) -> list[int]:
    (offers,) = drafter.offer([Asked(number, tokens, k)])
    (made,) = [one.tokens for one in offers] or [[]]
    assert len(made) == sum(one.k for one in offers)
    return list(made)


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    more=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=4),
    k=st.integers(0, 5),
    lengths=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
)
def test_lookup_is_a_search(tokens, more, k, lengths):
    longest, shortest = lengths
    drafter = make_drafter(f"lookup:longest={longest},shortest={shortest}", None)
    for extra in [[], *more]:
        tokens = tokens + extra
        expected = search(tokens, k, longest, shortest)
        assert guesses(drafter, 1, tokens, k) == expected
    assert guesses(drafter, 2, [1], 3) == []
    drafter.forget(1)
    assert guesses(drafter, 1, tokens, k) == search(tokens, k, longest, shortest)


@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    more=st.lists(st.integers(0, 2), max_size=20),
    lengths=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
)
def test_guesses_are_told_apart_by_how_the_text_went_on_before(tokens, more, lengths):
    longest, shortest = lengths
    drafter = make_drafter(f"lookup:longest={longest},shortest={shortest}", None)
    drafter.offer([Asked(1, tokens, 5)])
    tokens = tokens + more
    (offers,) = drafter.offer([Asked(1, tokens, 5)])

    def places(end, run):
        """Where the text went on behind what it went through in its ``run`` tokens before end."""
        return [i for i in range(run, end) if tokens[i - run : i] == tokens[end - run : end]]

    n = len(tokens)
    size = next((s for s in range(longest, shortest - 1, -1) if s <= n and places(n, s)), 0)
    assert bool(size) == bool(offers)
    if not size:
        return
    behind, run = places(n, size)[-1], size
    while run < min(behind, 32) and size == longest and behind in places(n, run + 1):
        run += 1
    for i, sort in enumerate(offers[0].sorts):
        before = places(behind + i, min(size + i, longest))
        how = ONCE
        if before:
            how = ALIKE if tokens[before[-1]] == tokens[behind + i] else APART
        assert sort.expected == EXPECTED[max(s for s in EXPECTED if s <= run + i)][how]


def test_guesses_of_a_sort_are_learnt_together_wherever_they_stand():
    good, bad, length = Sort(0.5), Sort(0.5), DraftLength()
    for _ in range(50):
        length.learn(1, Offer("x", (good, bad)), 2, 1)
    for number, most in ((1, 0.05), (2, 0.12)):  # a sequence's own record weighs more
        mixed = Offer("x", (bad, good, good))
        first, second, third = length.chances(number, mixed)
        assert first < most
        assert second / first == pytest.approx(third / second)
        assert second / first > 1 - most


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
        make_drafter(spec, None)
    assert make_drafter("none", None) is None


def length_for(*steps: tuple[int, float]) -> DraftLength:
    made = DraftLength()
    for rows, seconds in steps:
        made.steps.observe(rows, seconds)
    return made


def test_free_rows_take_every_guess_and_dear_ones_none():
    offers = [(i, [offer("x", 3)]) for i in range(3)]
    assert length_for((3, 1.0), (12, 1.0)).choose(offers, 3, 3).lengths == [3, 3, 3]
    assert length_for((3, 3.0), (4, 4.0), (12, 12.0)).choose(offers, 3, 3).lengths == [0, 0, 0]


def test_the_choice_is_the_best_of_all_choices():
    """Unless that is hardly better than none."""
    none = [0, 0, 0]
    taken = []
    for seed in range(10):
        length = length_for((3, 1.0), (6, 1.1 + seed / 20), (12, 1.6 + seed / 5))
        offers = [(i, [offer(f"{i}", 3)]) for i in range(3)]
        for number, (one,) in offers:
            for _ in range(10):
                length.learn(number, one, 3, (seed + number) % 4)

        def speed(ks, length=length, offers=offers):
            expected = 3.0
            for (number, (one,)), k in zip(offers, ks, strict=True):
                expected += sum(length.chances(number, one)[:k])
            plain = length.steps(3)
            return expected / (plain + CAUTION * (length.steps(3 + sum(ks)) - plain))

        chosen = length.choose(offers, 3, 3).lengths
        best = max(itertools.product(range(4), repeat=3), key=speed)
        if speed(best) < GAIN * speed(none):
            best = none
        assert speed(chosen) == pytest.approx(speed(best), rel=1e-6)
        taken.append(chosen)
    assert none in taken
    assert any(ks != none for ks in taken)


def test_chances_end_where_all_before_them_are_unlikely_enough():
    length, one = DraftLength(), offer("x", 8)
    whole = length.chances(0, one)
    assert whole == pytest.approx([0.5 * 0.6**place for place in range(8)])
    for least in (0.0, whole[0], whole[3] + 1e-9, whole[3] - 1e-9, 1.0):
        cut = next((i for i, chance in enumerate(whole, 1) if chance <= least), len(whole))
        assert length.chances(0, one, least) == whole[:cut]


def test_a_kind_that_fails_is_left_and_tried_again_later():
    length, failing = length_for((1, 1.0), (2, 1.3), (3, 1.6)), offer("x", 2)
    tries = []
    for _ in range(600):
        (k,) = length.choose([(0, [failing])], 1, 1).lengths
        tries.append(k)
        length.learn(0, failing, k, 0)
        length.steps.observe(1 + k, 1.0 + 0.3 * k)
    assert tries[0] > 0
    assert tries[30] == 0
    assert 0 < sum(t > 0 for t in tries[50:]) < 60


@pytest.mark.parametrize(("a_row", "pays"), [(0.6, True), (1.5, False)])
def test_guesses_are_tried_where_all_steps_have_been_alike(a_row, pays):
    """What a row costs shows only in steps of another size, so that one must be risked."""
    length, tried = DraftLength(), []
    offers = [(i, [offer("x", 4, 0.9, 0.9)]) for i in range(12)]
    for _ in range(400):
        lengths = length.choose(offers, 64, 64).lengths
        for (number, (one,)), k in zip(offers, lengths, strict=True):
            length.learn(number, one, k, k)
        length.steps.observe(64 + sum(lengths), 96.0 + a_row * sum(lengths))
        tried.append(sum(lengths) > 0)
    share = sum(tried[20:]) / len(tried[20:])
    assert share > 0.9 if pays else 0 < share < 0.1


def test_guesses_that_are_dear_to_make_are_left_where_they_do_not_pay():
    cheap, dear = offer("cheap", 2), offer("dear", 2)
    for made_in, wanted in ((0.05, "dear"), (0.6, "cheap")):
        length = length_for((2, 1.0), (3, 1.05), (4, 1.1), (6, 1.2))
        for _ in range(40):  # of the dear ones more are right
            length.learn(0, cheap, 2, 1)
            length.learn(0, dear, 2, 2)
            length.making["cheap"].observe(2, 0.001)
            length.making["dear"].observe(2, made_in)
        plan = length.choose([(0, [cheap, dear]), (1, [cheap])], 2, 2)
        assert [one and one.kind for one in plan.taken] == [wanted, "cheap"]
    for _ in range(40):
        length.making["dear"].observe(2, 2.0)
    alone = length.choose([(0, [dear])], 2, 2)
    assert (alone.taken, alone.lengths) == ([None], [0])


def test_guesses_that_are_dear_to_make_must_be_worth_it():
    cheap, dear = offer("cheap", 2), offer("dear", 2)
    taken = []
    for made_in in (x / 50 for x in range(1, 30)):
        length = length_for((2, 1.0), (3, 1.05), (4, 1.1), (6, 1.2))
        for _ in range(40):
            length.learn(0, cheap, 2, 1)
            length.learn(0, dear, 2, 2)
            length.making["dear"].observe(2, made_in)
        without = length.choose([(0, [cheap])], 2, 2).speed
        plan = length.choose([(0, [cheap, dear])], 2, 2)
        taken.append(plan.taken == [dear])
        assert plan.speed >= without * (WORTH if taken[-1] else 1)
    assert taken == sorted(taken, reverse=True)
    assert True in taken
    assert False in taken


def test_times_are_learnt_and_one_slow_step_is_forgotten():
    times = Times()
    assert times(9) > times(1)
    for _ in range(40):
        times.observe(1, 0.02)
        times.observe(8, 0.04)
    assert times(1) == pytest.approx(0.02, rel=0.1)
    assert times(8) == pytest.approx(0.04, rel=0.1)
    assert times(1) < times(4) < times(8) < times(16)
    times.observe(8, 5.0)
    assert times(8) < 0.05
    for _ in range(300):
        times.observe(1, 0.01)
    assert times(1) == pytest.approx(0.01, rel=0.1)


def test_one_slow_step_does_not_keep_others_of_as_many_rows_away():
    times = Times()
    for _ in range(40):
        times.observe(33, 1.0)
        times.observe(40, 1.01)
    times.observe(44, 10.0)
    assert times(44) < 1.15


def test_rows_that_are_multiplied_together_fill_up_cheaply():
    apart, together = Times(), Times(together=16)
    for times in (apart, together):
        for _ in range(40):
            for rows in (16, 32, 64):
                times.observe(rows, 1 + rows / 16)
    for times in (apart, together):
        assert [times(rows) for rows in (16, 32, 64)] == pytest.approx([2, 3, 5], rel=0.05)
    first, rest = together(17) - together(16), together(32) - together(17)
    assert first == pytest.approx(FIRST + (1 - FIRST) / 16, rel=0.1)
    assert rest == pytest.approx((1 - FIRST) * 15 / 16, rel=0.1)
    assert apart(17) - apart(16) < 0.1


@pytest.mark.parametrize("told", [True, False])
def test_what_a_sequence_costs_is_not_taken_to_be_what_a_guess_costs(told):
    """A sequence brings a row and a cache of its own to read, a guess only a row."""
    times = Times()
    for sequences in (64, 60, 56, 52, 48, 44, 40, 36) * 4:
        guesses = sequences % 11
        seconds = 0.5 * sequences + 0.3 * (sequences + guesses)
        times.observe(sequences + guesses, seconds, sequences if told else 0)
    guess = times(64 + 32, 64 if told else 0) - times(64, 64 if told else 0)
    assert guess == pytest.approx(0.3 * 32, rel=0.15) if told else guess > 0.6 * 32
    if told:
        assert times(50, 50) == pytest.approx(40.0, rel=0.05)


def test_sequences_that_come_and_go_do_not_tell_what_a_guess_costs():
    times = Times()
    for sequences in [*range(64, 8, -1)] * 2:
        times.observe(sequences, 0.8 * sequences, sequences)
    assert times.slope < 0.6 * 0.8
    assert times(40, 40) == pytest.approx(32.0, rel=0.05)


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 64), st.floats(1e-3, 1.0)),
        min_size=1,
        max_size=80,
    ),
    st.sampled_from([1, 16]),
    st.integers(0, 64),
)
def test_no_step_is_expected_to_be_free_or_faster_with_more_rows(steps, together, sequences):
    times = Times(together)
    for rows, of, seconds in steps:
        times.observe(rows, seconds, of)
    expected = [times(rows, sequences) for rows in range(1, 100)]
    assert expected[0] > 0
    assert expected == sorted(expected)

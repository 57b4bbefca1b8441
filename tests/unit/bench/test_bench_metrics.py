import math
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.bench import metrics

WORDS = st.lists(st.sampled_from(["red", "blue", "green", "x"]), max_size=7).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("The cat sat", "a cat", 2 / 3),
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("cat cat", "cat", 2 / 3),
        ("Paris!", "paris", 1.0),
        ("dog", "cat", 0.0),
    ],
)
def test_token_f1(prediction, answer, f1):
    assert metrics.token_f1(prediction, answer) == pytest.approx(f1)


def test_exact_match_ignores_case_articles_and_punctuation_only():
    assert metrics.exact_match("The Beatles.", "beatles") == 1.0
    assert metrics.exact_match("Beatles band", "beatles") == 0.0


def test_inclusion_wants_whole_words():
    assert metrics.inclusion("It was Bob Dylan, in 1990.", "bob dylan") == 1.0
    assert metrics.inclusion("notation", "no") == 0.0
    assert metrics.inclusion("it is 1234567.", "123456") == 0.0


def brute_lcs(a, b):
    for size in range(min(len(a), len(b)), 0, -1):
        of_b = {c for c in combinations(b, size)}
        if any(c in of_b for c in combinations(a, size)):
            return size
    return 0


@given(WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_rouge_l_is_twice_the_common_subsequence_over_both_lengths(a, b):
    x, y = a.split(), b.split()
    expected = 2 * brute_lcs(x, y) / (len(x) + len(y)) if x and y else float(x == y)
    assert metrics.rouge_l(a, b) == pytest.approx(expected)
    assert metrics.rouge_l(a, b) >= metrics.rouge_l(b, a) - 1e-12
    assert metrics.rouge_l(a, a) == 1.0


def test_edit_similarity_looks_at_the_first_line_with_text():
    assert metrics.edit_similarity("\n\n  return x\nother", "return x") == 1.0
    assert metrics.edit_similarity("", "return x") == 0.0
    ratio = metrics.edit_similarity("return y", "return x")
    assert ratio == pytest.approx(SequenceMatcher(None, "return y", "return x").ratio())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 9 * 2 = 18\n#### 18", "18"),
        ("#### 1,234 apples, 7 left", "1234"),
        ("It costs $2.50.", "2.5"),
        ("It costs $3.00", "3"),
        ("-4", "-4"),
        ("100", "100"),
        ("#### none, but 5 before: 6", "5"),
        ("nothing", None),
    ],
)
def test_last_number(text, number):
    assert metrics.last_number(text) == number


def test_final_number_never_matches_two_absences():
    assert metrics.final_number("none", "none") == 0.0
    assert metrics.final_number("the answer is 18.0", "x\n#### 18") == 1.0


def test_number_match_is_the_share_of_right_numbers():
    assert metrics.number_match("Paragraph 19", "Paragraph 19") == 1.0
    assert metrics.number_match("Paragraph 19 or 3", "Paragraph 19") == 0.5
    assert metrics.number_match("no idea", "Paragraph 19") == 0.0


def test_best_answer_counts():
    assert metrics.best("exact_match", "UT", ("University of Toronto", "UT")) == 1.0


def test_bootstrap_is_seeded_and_covers_the_mean():
    values = [0.0, 1.0, 2.0, 5.0, 9.0]
    low, high = metrics.bootstrap(values, seed=3)
    assert (low, high) == metrics.bootstrap(values, seed=3)
    assert low < sum(values) / len(values) < high


def test_bootstrap_matches_the_normal_interval_of_a_large_sample():
    values = [float(i % 10) for i in range(1000)]
    low, high = metrics.bootstrap(values, resamples=4000)
    half = 1.96 * math.sqrt(8.25 / 1000)
    assert low == pytest.approx(4.5 - half, abs=0.03)
    assert high == pytest.approx(4.5 + half, abs=0.03)


def test_grouped_values_are_drawn_together():
    values, groups = [0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50
    assert metrics.bootstrap(values, groups) == (0.0, 1.0)
    low, high = metrics.bootstrap(values)
    assert low > 0.3
    assert high < 0.7


def test_groups_of_unequal_size_weigh_by_their_items():
    low, high = metrics.bootstrap([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert (low, high) == (0.0, 1.0)
    assert Counter([metrics.bootstrap([2.0, 2.0], ["a", "b"])]) == {(2.0, 2.0): 1}


def test_paired_bootstrap_sees_a_constant_gap_in_noise():
    theirs = [float(i * 37 % 101) for i in range(60)]
    gap, (low, high) = metrics.paired_bootstrap([t - 0.5 for t in theirs], theirs)
    assert gap == pytest.approx(-0.5)
    assert low == pytest.approx(-0.5)
    assert high == pytest.approx(-0.5)


def test_an_empty_sample_has_no_interval():
    assert all(math.isnan(x) for x in metrics.bootstrap([]))


def test_unpaired_samples_are_refused():
    with pytest.raises(ValueError):
        metrics.paired_bootstrap([1.0], [1.0, 2.0])

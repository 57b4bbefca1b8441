import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.compression.select import delete_apart, fill, max_apart, stage_targets
from narrows.errors import BudgetError, ConfigError, NumericalError
from oracles.select_reference import fill_by_sorting, least_apart_by_table, least_apart_by_trial

few_values = st.integers(-3, 5).map(float)  # many ties, and sums that are exact


@given(st.integers(1, 5000), st.data(), st.integers(1, 20))
def test_stages_end_at_the_budget_and_delete_all_that_must_go(free, data, stages):
    budget = data.draw(st.integers(0, free))
    targets = stage_targets(free, budget, stages)
    lengths = [free, *targets]
    deletions = [a - b for a, b in zip(lengths, targets, strict=False)]
    assert sum(deletions) == free - budget
    assert all(d > 0 for d in deletions)
    assert len(targets) <= stages
    assert lengths[-1] == budget


def test_stages_shrink_by_equal_ratios():
    assert stage_targets(1000, 100, 2) == [316, 100]
    assert stage_targets(16, 1, 4) == [8, 4, 2, 1]
    assert stage_targets(7, 7, 5) == []
    assert stage_targets(5, 9, 3) == []
    assert stage_targets(0, 0, 3) == []


@pytest.mark.parametrize(("budget", "stages"), [(5, 0), (-1, 2)])
def test_impossible_stages_are_refused(budget, stages):
    with pytest.raises(ConfigError):
        stage_targets(10, budget, stages)


@given(st.lists(st.tuples(few_values, st.integers(1, 6)), max_size=40), st.integers(0, 60))
def test_fill_equals_the_plain_rule_and_meets_its_guarantee(units, budget):
    scores = np.asarray([score for score, _ in units])
    costs = np.asarray([cost for _, cost in units], dtype=np.int64)
    kept = fill(scores, costs, budget)
    assert kept.tolist() == fill_by_sorting(scores, costs, budget)
    total = int(costs[kept].sum())
    assert total <= budget
    if costs.sum() > budget:
        assert total >= budget - (costs.max() - 1)


@given(st.lists(few_values, min_size=1, max_size=60), st.data())
def test_fill_with_unit_costs_is_exact_and_nested(values, data):
    scores, costs = np.asarray(values), np.ones(len(values), dtype=np.int64)
    budget = data.draw(st.integers(0, len(values) - 1))
    kept, more = fill(scores, costs, budget), fill(scores, costs, budget + 1)
    assert kept.sum() == budget
    assert (more | ~kept).all()


def test_nan_scores_are_refused():
    scores = np.asarray([1.0, np.nan])
    with pytest.raises(NumericalError, match="1 of 2"):
        fill(scores, np.ones(2, dtype=np.int64), 1)
    with pytest.raises(NumericalError):
        delete_apart(scores, np.ones(2, dtype=bool), 1)


@given(st.lists(st.tuples(few_values, st.booleans()), max_size=14), st.data())
def test_delete_apart_is_optimal(units, data):
    scores = np.asarray([score for score, _ in units])
    deletable = np.asarray([allowed for _, allowed in units], dtype=bool)
    count = data.draw(st.integers(0, max_apart(deletable)))
    deleted = delete_apart(scores, deletable, count)
    _assert_apart(deleted, deletable, count)
    best = least_apart_by_trial(scores, deletable, count)
    assert scores[deleted].sum() == best == least_apart_by_table(scores, deletable, count)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.05, 0.5]), st.floats(0, 1))
def test_delete_apart_equals_the_table_on_long_texts(seed, protected, share):
    rng = np.random.default_rng(seed)
    scores, deletable = rng.normal(size=300), rng.random(300) >= protected
    count = int(share * max_apart(deletable))
    deleted = delete_apart(scores, deletable, count)
    _assert_apart(deleted, deletable, count)
    best = least_apart_by_table(scores, deletable, count)
    assert scores[deleted].sum() == pytest.approx(best, abs=1e-9)


@given(st.lists(st.booleans(), max_size=14))
def test_max_apart_is_where_feasibility_ends(allowed):
    deletable = np.asarray(allowed, dtype=bool)
    most, scores = max_apart(deletable), np.zeros(len(allowed))
    assert least_apart_by_trial(scores, deletable, most) == 0.0
    assert least_apart_by_trial(scores, deletable, most + 1) == np.inf
    with pytest.raises(BudgetError, match=f"at most {most}"):
        delete_apart(scores, deletable, most + 1)


def test_delete_apart_repeats_itself_among_equals():
    scores, deletable = np.zeros(101), np.ones(101, dtype=bool)
    first = delete_apart(scores, deletable, 40)
    assert (first == delete_apart(scores, deletable, 40)).all()
    _assert_apart(first, deletable, 40)


def test_delete_apart_takes_every_second_of_a_long_text():
    scores, deletable = np.arange(20_001.0), np.ones(20_001, dtype=bool)
    assert max_apart(deletable) == 10_001
    assert delete_apart(scores, deletable, 10_001)[::2].all()


def _assert_apart(deleted, deletable, count):
    assert deleted.sum() == count
    assert not (deleted & ~deletable).any()
    assert not (deleted[1:] & deleted[:-1]).any()

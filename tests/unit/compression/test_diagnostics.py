"""Diagnostics on numbers small enough to check by hand."""

import numpy as np
import pytest
import torch

from narrows.compression import diagnostics


def test_correlations():
    a, b = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert diagnostics.spearman(a, b) == pytest.approx(1.0)
    assert diagnostics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert diagnostics.spearman(a, -b) == pytest.approx(-1.0)
    assert diagnostics.pearson(a, np.ones(4)) is None
    assert diagnostics.pearson(a[:1], b[:1]) is None


def test_effective_weight_falls_below_alpha_with_an_outlier():
    even = np.linspace(0, 1, 101)
    assert diagnostics.effective_weight(even, even, 0.8) == pytest.approx(0.64 / 0.68)
    squeezed = np.zeros(101)
    squeezed[7] = 1.0
    assert diagnostics.effective_weight(squeezed, even, 0.8) < 0.7
    assert diagnostics.effective_weight(np.zeros(3), np.zeros(3), 0.8) is None


def test_runs_and_deciles():
    kept = np.array([1, 0, 0, 1, 0, 1, 1, 0, 0, 0], dtype=bool)
    assert diagnostics.deleted_runs(kept) == {"count": 3, "max": 3, "mean": 2.0}
    assert diagnostics.deleted_runs(np.ones(3, bool)) == {"count": 0, "max": 0, "mean": 0.0}
    assert diagnostics.kept_by_decile(kept) == [float(x) for x in kept]
    assert diagnostics.kept_by_decile(kept[:3])[3:] == [None] * 7


def test_entropy_shift():
    before, after = np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 1.0])
    shift = diagnostics.entropy_shift(before, after)
    assert shift["mean_abs"] == pytest.approx(4 / 3)
    assert shift["pearson"] == pytest.approx(np.corrcoef(before, after)[0, 1])
    assert diagnostics.entropy_shift(before[:0], after[:0]) == {"mean_abs": None, "pearson": None}


def test_shares_and_memory():
    kept, forced = np.array([True, True, False, False]), np.array([True, False, False, False])
    found = diagnostics.of_choice(kept, forced, 2, torch.device("cpu"))
    assert found["forced_share"] == 0.5
    assert found["peak_bytes"] > 1_000_000

import numpy as np
import pytest
import torch

import tiny_text
from narrows.compression.dac import scaled
from narrows.compression.sweep import DacSweep
from narrows.errors import ConfigError, NumericalError
from oracles import sweep_reference
from tiny_text import MIXED, PROSE, UNITS_OF_ONE, assert_within_one_unit, prepare


@pytest.fixture(scope="module")
def model():
    return tiny_text.pair()[0]


@pytest.mark.parametrize("granularity", ["token", "word", "phrase", "sentence"])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7, 0.95])
def test_budget_and_forced_units(model, granularity, keep):
    prepared = prepare(MIXED, keep, granularity, {2, 5})
    choice = DacSweep(model, segment_tokens=30).choose(prepared, None)
    assert_within_one_unit(prepared, choice.kept)
    assert np.isfinite(choice.scores).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_every_segment_is_judged_after_what_was_kept(family, alpha):
    model, stock = tiny_text.pair(family)
    prepared = prepare(UNITS_OF_ONE, 0.4, forced={0, 3, 90, 91})
    assert (prepared.units.costs == 1).all()
    made = DacSweep(model, segment_tokens=40, alpha=alpha, attn_norm="sum")
    choice = made.choose(prepared, None)

    def fuse(nats, received):
        surprisal, attention = scaled(np.array(nats)), scaled(np.array(received))
        return list((1 - alpha) * surprisal + alpha * attention)

    kept, scores = sweep_reference.compress(
        stock, prepared.tokens.ids, {0, 3, 90, 91}, prepared.budget, 40, fuse
    )
    np.testing.assert_allclose(choice.scores, scores, atol=2e-3)
    assert np.flatnonzero(choice.kept).tolist() == kept


def test_each_token_is_read_exactly_once(model, monkeypatch):
    read = []
    hidden = type(model).hidden
    monkeypatch.setattr(
        type(model), "hidden", lambda self, ids, *a: read.append(len(ids)) or hidden(self, ids, *a)
    )
    prepared = prepare(PROSE, 0.5)
    DacSweep(model, segment_tokens=25).choose(prepared, None)
    assert sum(read) == len(prepared.tokens.ids)


def test_deleted_tokens_are_not_seen_by_later_segments(model):
    """Negative control: with the deletions undone the later scores differ."""
    prepared = prepare(PROSE, 0.3)
    sweeping = DacSweep(model, segment_tokens=40, alpha=0.0).choose(prepared, None)
    whole = DacSweep(model, segment_tokens=40, alpha=0.0).choose(prepare(PROSE, 0.99), None)
    np.testing.assert_allclose(sweeping.scores[:40], whole.scores[:40], atol=1e-5)
    assert np.abs(sweeping.scores[40:] - whole.scores[40:]).max() > 1e-3


def test_a_text_longer_than_the_window_starts_anew(model):
    prepared = prepare(PROSE * 6, 0.4)
    assert len(prepared.tokens.ids) > model.shape.max_tokens
    choice = DacSweep(model, segment_tokens=200).choose(prepared, None)
    assert_within_one_unit(prepared, choice.kept)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_sliding_window_models(family):
    prepared = prepare(PROSE, 0.4)
    choice = DacSweep(tiny_text.pair(family)[0], segment_tokens=30).choose(prepared, None)
    assert_within_one_unit(prepared, choice.kept)


def test_bad_options(model):
    with pytest.raises(ConfigError, match="model"):
        DacSweep(None)
    with pytest.raises(ConfigError, match="segment_tokens 5000"):
        DacSweep(model, segment_tokens=5000)


def test_numbers_that_are_not_finite_are_refused(model, monkeypatch):
    monkeypatch.setattr(
        type(model), "logits", lambda self, h: torch.full((len(h), 320), float("nan"))
    )
    with pytest.raises(NumericalError):
        DacSweep(model).choose(prepare(PROSE, 0.4), None)

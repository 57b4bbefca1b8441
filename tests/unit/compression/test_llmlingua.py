import numpy as np
import pytest

import tiny_text
from narrows.compression.llmlingua import LLMLingua
from narrows.compression.units import tokenize
from narrows.errors import ConfigError
from oracles import llmlingua_reference
from tiny_text import (
    MIXED,
    PROSE,
    UNITS_OF_ONE,
    assert_within_one_unit,
    kept_text,
    prepare,
)

LONG = PROSE * 2


@pytest.fixture(scope="module")
def model():
    return tiny_text.pair()[0]


@pytest.mark.parametrize("granularity", ["token", "word", "phrase", "sentence"])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7, 0.95])
def test_budget_and_forced_units(model, granularity, keep):
    prepared = prepare(MIXED, keep, granularity, {2, 5})
    choice = LLMLingua(model, passage_tokens=40, segment_tokens=30).choose(prepared, None)
    assert_within_one_unit(prepared, choice.kept)
    assert choice.scores.shape == (len(prepared.tokens.ids),)
    assert np.isfinite(choice.scores).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("coarse_factor", [2.0, 100.0])
def test_every_segment_is_judged_after_what_was_kept(family, coarse_factor):
    model, stock = tiny_text.pair(family)
    prepared = prepare(UNITS_OF_ONE, 0.4, forced={3, 90, 91})
    assert (prepared.units.costs == 1).all()
    compressor = LLMLingua(model, coarse_factor=coarse_factor, passage_tokens=30, segment_tokens=40)
    choice = compressor.choose(prepared, None)
    alive, _ = compressor._coarse(prepared, np.zeros(len(choice.scores)))
    assert alive.all() == (coarse_factor > 2)
    living = np.flatnonzero(alive).tolist()
    kept, scores = llmlingua_reference.compress(
        stock, prepared.tokens.ids, living, {3, 90, 91}, prepared.budget, 40
    )
    np.testing.assert_allclose(choice.scores[living], [scores[t] for t in living], atol=2e-3)
    assert np.flatnonzero(choice.kept).tolist() == kept


def test_sliding_window_model_with_segments_longer_than_a_rollback():
    model, stock = tiny_text.pair("mistral")
    prepared = prepare(UNITS_OF_ONE, 0.9)
    choice = LLMLingua(model, segment_tokens=150, coarse_factor=9).choose(prepared, None)
    living = list(range(len(prepared.units)))
    kept, _ = llmlingua_reference.compress(
        stock, prepared.tokens.ids, living, set(), prepared.budget, 150
    )
    assert np.flatnonzero(choice.kept).tolist() == kept


def test_coarse_step_keeps_passages_of_high_perplexity(model):
    prepared = prepare(LONG, 0.2)
    compressor = LLMLingua(model, passage_tokens=50)
    alive, counts = compressor._coarse(prepared, np.zeros(len(prepared.tokens.ids)))
    assert 0 < counts["kept"] < counts["found"]
    edges = np.flatnonzero(np.diff(alive.astype(int)))
    pieces = np.split(np.arange(len(alive)), edges + 1)
    assert prepared.units.costs[alive].sum() >= 2 * prepared.free

    def perplexity(units):
        text = kept_text(prepared, np.isin(np.arange(len(alive)), units))
        ids = tokenize(text, model.tokenizer).ids
        nats = compressor._scorer.score(ids, attention=False).surprisal
        return nats.sum() / max(len(ids) - 1, 1)

    in_, out = ([perplexity(p) for p in pieces if alive[p[0]] == side] for side in (True, False))
    assert np.mean(in_) > np.mean(out)


def test_protected_text_of_a_dropped_passage_survives(model):
    plain = prepare(LONG, 0.1)
    compressor = LLMLingua(model, passage_tokens=50)
    alive, _ = compressor._coarse(plain, np.zeros(len(plain.tokens.ids)))
    lost = int(np.flatnonzero(~alive)[-1])
    prepared = prepare(LONG, 0.1, forced={lost})
    assert compressor.choose(prepared, None).kept[lost]


def test_a_text_longer_than_the_model_s_context(model):
    prepared = prepare(PROSE * 6, 0.8)
    assert prepared.budget > model.shape.max_tokens
    assert_within_one_unit(prepared, LLMLingua(model).choose(prepared, None).kept)


def test_a_unit_longer_than_the_model_s_context_is_refused(model):
    prepared = prepare("x" * 600 + ". The end.", 0.95, "sentence")
    with pytest.raises(ConfigError, match="lower segment_tokens or choose a finer granularity"):
        LLMLingua(model).choose(prepared, None)


def test_no_character_is_broken(model):
    for keep in (0.1, 0.5, 0.8):
        prepared = prepare(MIXED, keep)
        text = kept_text(prepared, LLMLingua(model).choose(prepared, None).kept)
        assert "\ufffd" not in text
        assert ("👩" in text) == ("👩‍👩‍👧" in text)
        assert text.count("\r") == text.count("\r\n")


@pytest.mark.parametrize("option", ["coarse_factor", "passage_tokens", "segment_tokens"])
@pytest.mark.parametrize("value", [0, -3, float("nan")])
def test_bad_options(model, option, value):
    with pytest.raises(ConfigError, match=option):
        LLMLingua(model, **{option: value})


def test_needs_a_model():
    with pytest.raises(ConfigError, match="needs a model"):
        LLMLingua(tokenizer=tiny_text.tokenizer())


def test_settings_hold_every_option(model):
    changed = LLMLingua(model, coarse_factor=3, passage_tokens=50, segment_tokens=60).settings()
    default = LLMLingua(model).settings()
    assert {k for k in changed if changed[k] != default[k]} == {
        "coarse_factor",
        "passage_tokens",
        "segment_tokens",
    }

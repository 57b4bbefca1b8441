from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_text
from narrows.compression import make_compressor
from narrows.compression.baselines import (
    Random,
    SelectiveContext,
    TruncateHead,
    TruncateMiddle,
    TruncateTail,
)
from narrows.compression.score import Scorer
from narrows.errors import ConfigError
from tiny_text import MIXED, PROSE, assert_within_one_unit, kept_text, prepare

TRUNCATIONS = (TruncateHead, TruncateTail, TruncateMiddle)
GRANULARITIES = ("token", "word", "phrase", "sentence")


@pytest.fixture(scope="module")
def model():
    return tiny_text.pair()[0]


def make(cls, **options):
    return cls(tokenizer=tiny_text.tokenizer(), **options)


@given(
    st.sampled_from([Random, *TRUNCATIONS]),
    st.sampled_from(GRANULARITIES),
    st.floats(0.02, 0.98),
    st.sets(st.integers(0, 3)),
)
def test_budget_and_forced_units(cls, granularity, keep, forced):
    prepared = prepare(MIXED, keep, granularity, forced)
    assert_within_one_unit(prepared, make(cls).choose(prepared, None).kept)


@pytest.mark.parametrize("granularity", ["phrase", "token", "sentence"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_selective_context_budget(model, granularity, keep):
    prepared = prepare(MIXED, keep, granularity, {2})
    assert_within_one_unit(prepared, SelectiveContext(model).choose(prepared, None).kept)


def test_no_method_breaks_a_character(model):
    for compressor in (make(Random), *map(make, TRUNCATIONS), SelectiveContext(model)):
        for keep in (0.1, 0.5, 0.8):
            prepared = prepare(MIXED, keep)
            text = kept_text(prepared, compressor.choose(prepared, None).kept)
            assert "\ufffd" not in text
            assert ("👩" in text) == ("👩‍👩‍👧" in text)
            assert text.count("\r") == text.count("\r\n")


def test_random_repeats_by_seed_and_only_by_seed():
    prepared = prepare(PROSE, 0.5)
    one, same, other = (make(Random, seed=s).choose(prepared, None).kept for s in (7, 7, 8))
    assert (one == same).all()
    assert (one != other).any()
    with pytest.raises(ConfigError, match="seed"):
        make(Random, seed=-1)


def test_random_favours_no_place():
    prepared = prepare(PROSE, 0.5)
    often = np.mean([make(Random, seed=s).choose(prepared, None).kept for s in range(200)], axis=0)
    assert abs(often - 0.5).max() < 0.2
    assert abs(often[: len(often) // 2].mean() - 0.5) < 0.02


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncation_keeps_ends(granularity, keep):
    prepared = prepare(PROSE, keep, granularity)
    kept = {cls: make(cls).choose(prepared, None).kept for cls in TRUNCATIONS}
    assert PROSE.startswith(kept_text(prepared, kept[TruncateHead]))
    assert PROSE.endswith(kept_text(prepared, kept[TruncateTail]))
    gap = np.flatnonzero(~kept[TruncateMiddle])
    assert (np.diff(gap) == 1).all()


def test_middle_cut_shares_the_budget_evenly():
    prepared = prepare(PROSE, 0.4)
    kept = make(TruncateMiddle).choose(prepared, None).kept
    head = int(np.argmin(kept))
    tail = int(np.argmin(kept[::-1]))
    assert abs(head - tail) <= 1
    assert head + tail == prepared.budget


def test_truncation_keeps_protected_text_elsewhere():
    prepared = prepare(PROSE, 0.1, forced={100, 101})
    kept = make(TruncateHead).choose(prepared, None).kept
    free = np.flatnonzero(kept & ~prepared.forced)
    assert free.tolist() == list(range(len(free)))
    assert kept.sum() == prepared.budget


def test_selective_context_keeps_the_most_surprising_phrases(model):
    prepared = prepare(PROSE, 0.5, "phrase")
    choice = SelectiveContext(model).choose(prepared, None)
    surprisal = Scorer(model).score(prepared.tokens, attention=False).surprisal
    np.testing.assert_allclose(choice.scores, surprisal)
    bounds = prepared.units.bounds
    means = [surprisal[a:b].mean() for a, b in pairwise(bounds)]
    left = prepared.budget
    for unit in np.argsort(means)[::-1]:
        cost = int(prepared.units.costs[unit])
        assert choice.kept[unit] == (cost <= left)
        left -= cost if cost <= left else 0


def test_selective_context_defaults_to_phrases_and_scores_the_first_token_on_request(model):
    assert SelectiveContext(model).settings()["granularity"] == "phrase"
    prepared = prepare(PROSE)
    scores = SelectiveContext(model, prepend_bos=True).choose(prepared, None).scores
    assert scores[0] > 0.0


def test_selective_context_needs_a_model():
    with pytest.raises(ConfigError, match="needs a model"):
        make(SelectiveContext)


@pytest.mark.parametrize(
    "name", ["random", "head", "tail", "head-tail", "selective-context", "llmlingua", "extractive"]
)
def test_by_name_and_whole(model, name):
    compressor = make_compressor(name, model, protect="1907")
    short = compressor.compress(MIXED, target_tokens=90, question="Who sells tea?")
    assert "".join(MIXED[a:b] for a, b in short.kept) == short.text
    assert "1907" in short.text
    assert short.method == name
    assert 0 < short.tokens <= 90
    assert compressor.compress(MIXED, keep_ratio=1.0).text == MIXED


def test_settings_tell_methods_and_options_apart(model):
    made = [
        make(Random),
        make(Random, seed=1),
        *map(make, TRUNCATIONS),
        SelectiveContext(model),
        SelectiveContext(model, chunk_tokens=64),
    ]
    assert len({str(compressor.settings()) for compressor in made}) == len(made)

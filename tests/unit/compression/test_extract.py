import numpy as np
import pytest

import tiny_text
from narrows.compression import extract
from narrows.compression.extract import Extractive
from narrows.errors import ConfigError, InputError
from narrows.retrieve.rank import BM25
from tiny_text import MIXED, PROSE, assert_within_one_unit, kept_text, prepare


def make(**options):
    return Extractive(tokenizer=tiny_text.tokenizer(), **options)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("granularity", ["sentence", "token"])
def test_budget_and_forced_units(keep, granularity):
    prepared = prepare(MIXED, keep, granularity, {1})
    assert_within_one_unit(prepared, make().choose(prepared, "Who sells bread?").kept)


def test_the_sentences_asked_for_in_order():
    prepared = prepare(PROSE, 0.4, "sentence")
    text = kept_text(prepared, make().choose(prepared, "When did the harbour freeze?").kept)
    assert "In 1907 the harbour froze;" in text
    text = kept_text(prepared, make().choose(prepared, "bread and the ferry").kept)
    assert text.index("ferry left") < text.index("Bread is sold")


def test_chinese_question():
    prepared = prepare(MIXED, 0.3, "sentence")
    assert "没有人说话！" in kept_text(prepared, make().choose(prepared, "谁说话？").kept)


def test_scores_are_the_ranker_s_for_every_token_of_a_sentence():
    prepared = prepare(PROSE, 0.3, "sentence")
    choice = make().choose(prepared, "ferry")
    bounds = prepared.units.bounds
    texts = [
        kept_text(prepared, np.arange(len(prepared.units)) == u) for u in range(len(prepared.units))
    ]
    expected = BM25().score("ferry", texts)
    assert "".join(texts) == PROSE
    assert (choice.scores[bounds[:-1]] == expected).all()
    assert (choice.scores[bounds[1:] - 1] == expected).all()


@pytest.mark.parametrize("question", [None, "", " \n"])
def test_no_question(question):
    with pytest.raises(InputError, match="needs a question"):
        make().choose(prepare(PROSE, 0.3, "sentence"), question)


def test_defaults_and_unknown_ranker():
    assert make().settings()["granularity"] == "sentence"
    assert make().settings()["ranker"] == "bm25"
    with pytest.raises(ConfigError, match="did you mean 'bm25'"):
        make(ranker="bm52")


def test_any_ranker_by_name(monkeypatch):
    class Longest:
        def score(self, question, texts):
            return np.array([float(len(text)) for text in texts])

    monkeypatch.setitem(extract.RANKERS._targets, "longest", Longest)
    prepared = prepare(PROSE, 0.5, "sentence")
    assert "Anna Lund" in kept_text(prepared, make(ranker="longest").choose(prepared, "x").kept)

"""Search: exact, in a stable order, by vectors, words or both."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import ConfigError, InputError
from narrows.retrieve import speech_search
from narrows.retrieve.hearing import Heard
from narrows.retrieve.rank import BM25
from narrows.retrieve.speech_index import Recording
from narrows.retrieve.speech_search import MODES, WORDS, SpeechSearch

NONE = np.zeros(0, np.int32)


def unit(*numbers: float) -> np.ndarray:
    vector = np.array(numbers, np.float32)
    return vector / np.linalg.norm(vector)


def recording(name: str, texts: list[str], vectors: np.ndarray) -> Recording:
    heard = [Heard(t, NONE, v) for t, v in zip(texts, vectors, strict=True)]
    times = np.array([[10.0 * i, 10.0 * i + 9] for i in range(len(texts))]).reshape(-1, 2)
    return Recording(name * 64, f"{name}.wav", 10.0 * len(texts), times, heard)


def random_recordings(seed: int, count: int) -> list[Recording]:
    rng = np.random.default_rng(seed)
    words = ["harbour", "bridge", "earthquake", "bread", "penguin", "river", "the", "a"]
    made = []
    for name in "abc":
        vectors = rng.normal(size=(count, 16)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]
        made.append(recording(name, texts, vectors))
    return made


@given(seed=st.integers(0, 99), count=st.integers(1, 30), k=st.integers(1, 40))
def test_vectors_are_ranked_as_by_hand(seed: int, count: int, k: int) -> None:
    recordings = random_recordings(seed, count)
    asked = unit(*np.random.default_rng(seed + 1).normal(size=16))
    hits = SpeechSearch(recordings).search("bread", asked, k, mode="vectors")
    expected = sorted(
        (
            (-round(float(h.vector @ asked), 6), r.name, i)
            for r in recordings
            for i, h in enumerate(r.heard)
        ),
    )[:k]
    assert [(h.name, h.clip) for h in hits] == [(name, i) for _, name, i in expected]
    np.testing.assert_allclose([h.score for h in hits], [-s for s, _, _ in expected], atol=2e-6)


@given(seed=st.integers(0, 99), count=st.integers(1, 30))
def test_fusion_weighs_words_beside_cosines(seed: int, count: int) -> None:
    recordings = random_recordings(seed, count)
    asked = unit(*np.random.default_rng(seed + 1).normal(size=16))
    question = "penguin bread"
    clips = [(r, i) for r in recordings for i in range(count)]
    words = BM25().score(question, [r.heard[i].text for r, i in clips])
    fused = [
        round(float(r.heard[i].vector @ asked), 6) + WORDS * score
        for (r, i), score in zip(clips, words, strict=True)
    ]
    best = sorted(range(len(clips)), key=lambda j: (-round(fused[j], 6), j))[:5]
    hits = SpeechSearch(recordings).search(question, asked, 5)
    assert [(h.name, h.clip) for h in hits] == [(clips[j][0].name, clips[j][1]) for j in best]
    np.testing.assert_allclose([h.score for h in hits], [fused[j] for j in best], atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_equal_clips_keep_their_order(mode: str) -> None:
    same = np.tile(unit(*np.random.default_rng(0).normal(size=384)), (50, 1))
    hits = SpeechSearch([recording("a", ["the bridge"] * 50, same)]).search(
        "bridge", same[0], 50, mode=mode
    )
    assert [h.clip for h in hits] == list(range(50))


def test_words_leave_out_what_shares_none() -> None:
    search = SpeechSearch([recording("a", ["bread", "river"], np.eye(2, dtype=np.float32))])
    hits = search.search("Bread?", unit(0, 1), mode="words")
    assert [(h.text, h.start, h.end) for h in hits] == [("bread", 0.0, 9.0)]
    assert search.search("zebra", unit(0, 1), mode="words") == []
    assert [h.text for h in search.search("zebra", unit(0, 1))] == ["river", "bread"]


def test_clips_in_which_nothing_was_said_are_never_found() -> None:
    vectors = np.zeros((2, 2), np.float32)
    search = SpeechSearch([recording("a", ["", " "], vectors)])
    assert len(search) == 0
    for mode in MODES:
        assert search.search("bread", unit(1, 0), mode=mode) == []
    assert SpeechSearch([]).search("bread", unit(1, 0)) == []


def test_what_cannot_be_asked() -> None:
    search = SpeechSearch([recording("a", ["bread"], np.eye(1, 2, dtype=np.float32))])
    with pytest.raises(ConfigError, match="known: fused, vectors, words"):
        search.search("bread", unit(1, 0), mode="dense")
    with pytest.raises(ConfigError, match="k must be at least 1"):
        search.search("bread", unit(1, 0), 0)
    with pytest.raises(InputError, match="question is empty"):
        search.search(" ", unit(1, 0), mode="words")


def test_among_very_many_clips_a_graph_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = random_recordings(0, 300)
    exact = SpeechSearch(recordings)
    asked = [unit(*np.random.default_rng(i).normal(size=16)) for i in range(20)]
    options = [(vector, mode) for vector in asked for mode in MODES]

    def found() -> list[list[tuple[str, int]]]:
        searched = (exact.search("penguin bread", v, 10, mode=mode) for v, mode in options)
        return [[(hit.name, hit.clip) for hit in hits] for hits in searched]

    right = found()
    monkeypatch.setattr(speech_search, "EXACT", 100)
    monkeypatch.setattr(speech_search, "CANDIDATES", 200)
    near = found()
    shares = [len({*a} & {*b}) / len(b) for a, b in zip(near, right, strict=True)]
    assert np.mean(shares) > 0.97
    monkeypatch.setattr(speech_search, "CANDIDATES", 3)
    assert [len(exact.search("penguin", v, 10, mode="vectors")) for v in asked] == [3] * 20


def test_without_faiss_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_search, "EXACT", 2)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="more than 2 clips needs faiss: pip install faiss-cpu"):
        SpeechSearch(random_recordings(0, 2)).search("bread", unit(*range(1, 17)))

"""BM25 over guesses: against its definition, and what it finds that a transcript does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.retrieve.guessed import K1, POWER, B, GuessedBM25
from narrows.retrieve.hearing import Guesses, Heard
from narrows.retrieve.rank import BM25
from narrows.retrieve.speech_index import Recording
from narrows.retrieve.speech_search import SpeechSearch


def guesses(*tokens):
    """Of each token, its pieces with their chances."""
    ids = [[piece for piece, _ in own] for own in tokens]
    chances = [[chance for _, chance in own] for own in tokens]
    width = len(tokens[0]) if tokens else 2
    return Guesses(
        np.array(ids, np.int32).reshape(-1, width), np.array(chances, np.float16).reshape(-1, width)
    )


def by_hand(clips, pieces):
    """Piece by piece and clip by clip."""
    lengths = [len(clip.ids) for clip in clips]
    mean = sum(lengths) / len(lengths) or 1.0

    def occurs(clip, piece):
        found = zip(clip.ids.ravel(), clip.chances.ravel(), strict=True)
        return sum(float(chance) ** POWER for other, chance in found if other == piece)

    scores = []
    for clip, length in zip(clips, lengths, strict=True):
        score = 0.0
        for piece in pieces:
            held = sum(min(1.0, occurs(other, piece)) for other in clips)
            rarity = math.log(1 + (len(clips) - held + 0.5) / (held + 0.5))
            often = occurs(clip, piece)
            score += rarity * often / (often + K1 * (1 - B + B * length / mean)) if often else 0.0
        scores.append(score)
    return scores


token = st.lists(st.tuples(st.integers(0, 5), st.floats(0.01, 1.0)), min_size=2, max_size=2)


@given(st.lists(st.lists(token, max_size=4), min_size=1, max_size=5), st.lists(st.integers(0, 7)))
def test_scores_by_hand(told, pieces):
    clips = [guesses(*clip) for clip in told]
    np.testing.assert_allclose(GuessedBM25(clips).score(pieces), by_hand(clips, pieces), atol=1e-9)


@given(st.lists(st.text("abc", max_size=6), min_size=1, max_size=6), st.text("abcd", max_size=4))
def test_certain_guesses_are_words(texts, asked):
    """Of letters as words, which it is sure of, it makes what BM25 makes."""
    clips = [guesses(*([(ord(c), 1.0)] for c in text)) for text in texts]
    clips = [Guesses(one.ids[:, :1], one.chances[:, :1]) for one in clips]
    told = BM25(k1=K1, b=B).score(f"{' '.join(asked)} .e", [" ".join(text) for text in texts])
    np.testing.assert_allclose(GuessedBM25(clips).score([*map(ord, asked)]), told, atol=1e-5)


def test_no_clips():
    assert GuessedBM25([]).score([1, 2]).shape == (0,)


def heard(text, unsure):
    vector = np.array([1.0, 0.0], np.float32)
    return Heard(text, np.zeros(len(unsure.ids), np.int32), vector, unsure)


def test_a_word_that_was_nearly_heard_is_found():
    clips = [
        heard("mad dog", guesses([(1, 0.9), (2, 0.1)], [(3, 1.0), (4, 0.0)])),
        heard("bad cat", guesses([(5, 0.6), (6, 0.4)], [(7, 1.0), (8, 0.0)])),
    ]
    recording = Recording("", "", 2.0, np.zeros((2, 2)), clips)
    vector = clips[0].vector
    pieces = {"bat": [6], "cat": [7]}.__getitem__
    for question, found in (("bat", [1]), ("cat", [1])):
        hits = SpeechSearch([recording], pieces).search(question, vector, mode="words")
        assert [hit.clip for hit in hits] == found
    assert SpeechSearch([recording]).search("bat", vector, mode="words") == []
    plain = [Heard(h.text, h.tokens, h.vector) for h in clips]
    without = SpeechSearch([Recording("", "", 2.0, np.zeros((2, 2)), plain)], pieces)
    assert without.search("bat", vector, mode="words") == []
    assert [hit.clip for hit in without.search("cat", vector, mode="words")] == [1]


def test_sums_are_of_chances_as_they_are_kept():
    often = 0.25**POWER
    (score,) = GuessedBM25([guesses([(1, 0.25), (2, 0.5)])]).score([1])
    held = min(1.0, often)
    assert score == pytest.approx(math.log(1 + (1.5 - held) / (held + 0.5)) * often / (often + K1))

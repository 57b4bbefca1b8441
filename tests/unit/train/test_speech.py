"""What is spoken, by whom, and how what was made is kept."""

from __future__ import annotations

import random
import shutil
import sys

import numpy as np
import pytest
import torch

from narrows.errors import ConfigError, InputError, ModelError
from narrows.retrieve.audio import RATE
from narrows.train import speech
from narrows.train.speech import (
    ESPEAK,
    FLITE,
    HELD_VOICES,
    HIBARI,
    PART,
    VOICES,
    SpeechSet,
    in_band,
    speak,
    speak_all,
    with_noise,
    worn,
)
from narrows.train.spoken_text import LEAST, MOST, Stretch, cut, stretches, verbalised, words_of
from tiny_speech import spoken_data


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("In 1995, 3.5% left.", "In nineteen ninety five, three point five percent left."),
        ("the 1990s", "the nineteen nineties"),
        ("$1,200 & 21st", "one thousand, two hundred dollars and twenty first"),
        ("café naïve “so”", "cafe naive so"),
        ("1,995 or 12:30", "one thousand, nine hundred and ninety five or twelve: thirty"),
        ("Teutberga( died 11 November 875)", "Teutberga died eleven November eight hundred and"),
        ("no 12345678901", "no one two three four five six seven eight nine zero one"),
    ],
)
def test_numbers_and_signs_in_words(text, spoken):
    assert verbalised(text).startswith(spoken)
    assert not any(c.isdigit() for c in verbalised(text))


def test_words():
    assert words_of("Don't stop: it's 'Fine'. A.B.") == "don't stop it's fine a b"
    assert words_of("?!") == ""


def test_cut_keeps_every_word_and_sentences_whole():
    text = "One two three. " * 20 + " ".join(["long"] * 80) + ". The end."
    pieces = list(cut(text))
    assert " ".join(pieces).split() == text.split()
    assert all(len(piece.split()) <= MOST for piece in pieces)
    assert pieces[0].endswith("three.")


def test_stretches_of_the_data_hold_out_whole_articles(tmp_path):
    found = stretches(spoken_data(tmp_path))
    assert found == stretches(tmp_path)
    assert found != stretches(tmp_path, seed=1)
    held = {one.article for one in found if one.held}
    assert 0 < len(held) < 12
    assert not held & {one.article for one in found if not one.held}
    asked = [one for one in found if one.question.startswith("q")]
    assert len(asked) == 12
    for one in asked:
        assert "nineteen" in one.text
        assert one.article == f"place {one.question[1:]}"
    assert all(LEAST <= len(one.text.split()) <= MOST for one in found)
    assert len({one.text for one in found}) == len(found)


# ---------------------------------------------------------------------------------------- waves


def tone(hertz, seconds=1.0):
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_noise_is_as_loud_as_asked(tilt):
    wave = tone(400)
    added = with_noise(wave, 10.0, np.random.default_rng(0), tilt) - wave
    ratio = np.square(wave).mean() / np.square(added).mean()
    assert 10 * np.log10(ratio) == pytest.approx(10.0, abs=0.01)
    assert added.dtype == np.float32


def test_a_band():
    kept = in_band(tone(100) + tone(1000) + tone(6000), 300, 3400)
    np.testing.assert_allclose(kept, tone(1000), atol=1e-3)


def test_wear_is_repeatable_and_never_clips():
    wave = tone(300)
    for seed in range(20):
        one, other = (worn(wave, random.Random(seed)) for _ in range(2))
        assert np.array_equal(one, other)
        assert 0 < np.abs(one).max() < 1
    assert not worn(np.zeros(100, np.float32), random.Random(3)).any()


def test_held_voices_are_never_heard_in_training():
    assert not set(HELD_VOICES) & set(VOICES)


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="apt-get install flite espeak-ng"):
        speak("hello", (FLITE, "slt"))


def test_voices_that_cannot_speak(monkeypatch):
    with pytest.raises(ConfigError, match="no program 'festival' speaks here"):
        speak("hello", ("festival", "kal"))
    monkeypatch.setitem(sys.modules, "hibari", None)
    with pytest.raises(ConfigError, match="pip install hibari-tts"):
        speak("hello", (HIBARI, "nobody"))
    monkeypatch.delitem(sys.modules, "hibari")
    pytest.importorskip("hibari")
    with pytest.raises(ConfigError, match="hibari cannot speak as 'nobody'"):
        speak("hello", (HIBARI, "nobody"))


@pytest.mark.parametrize("voice", [(FLITE, "slt"), (ESPEAK, "en-us+f2"), (HIBARI, "heart")])
def test_speech(voice):
    if voice[0] == HIBARI:
        pytest.importorskip("hibari")
    elif shutil.which(voice[0]) is None:
        pytest.skip(f"{voice[0]} is not installed")
    slow, fast = (speak("the ferry left at dawn", voice, speed) for speed in (0.8, 1.25))
    assert slow.dtype == np.float32
    assert slow.ndim == 1
    assert 1.2 < len(slow) / len(fast) < 2.0
    assert 0.5 < len(fast) / RATE < 4


# ---------------------------------------------------------------------------------------- cache


class FakeEncoder:
    name = "fake"

    def __init__(self):
        self.calls = 0

    def encode(self, waves):
        self.calls += len(waves)
        return [torch.full((len(wave) // 320 + 1, 4), float(wave[0])) for wave in waves]


@pytest.fixture
def quick(monkeypatch):
    """Speech without voices: a wave as long as its text, at the level of its length."""
    said = []

    def fake(text, voice, speed=1.0):
        said.append(voice)
        return np.full(320 * len(text), len(text) / 1000, np.float32)

    monkeypatch.setattr(speech, "speak", fake)
    return said


def texts(count):
    return [Stretch("word " * (n % 7 + 1), f"a{n}", "", n % 5 == 0) for n in range(count)]


def test_what_is_made_is_kept_and_gone_on_from(tmp_path, quick):
    encoder = FakeEncoder()
    made = speak_all(texts(PART + 6), encoder, tmp_path)
    assert len(made) == encoder.calls == PART + 6
    for i, clip in enumerate(made.clips):
        assert clip.words == "word " * (i % 7) + "word"
        assert len(made.states(i)) == len(texts(PART + 6)[i].text) + 1
        assert made.states(i).dtype == torch.float16
        assert (tuple(clip.voice.split()) in HELD_VOICES) == clip.held == (i % 5 == 0)
    again = speak_all(texts(PART + 6), encoder, tmp_path)
    assert encoder.calls == PART + 6
    assert all(torch.equal(again.states(i), made.states(i)) for i in range(len(made)))
    (tmp_path / "part-00001.safetensors").unlink()
    redone = speak_all(texts(PART + 6), encoder, tmp_path)
    assert encoder.calls == PART + 12
    assert torch.equal(redone.states(PART + 2), made.states(PART + 2))
    with pytest.raises(InputError, match="give another folder"):
        speak_all(texts(PART + 6), encoder, tmp_path, seed=1)


def test_damaged_parts(tmp_path, quick):
    speak_all(texts(3), FakeEncoder(), tmp_path)
    path = tmp_path / "part-00000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="is damaged"):
        speak_all(texts(3), FakeEncoder(), tmp_path)
    with pytest.raises(ModelError, match="is damaged"):
        SpeechSet([path])


def test_clips_longer_than_the_encoder_hears_are_left_out(tmp_path, quick):
    long = Stretch("word " * 400, "a", "", False)
    made = speak_all([long, *texts(2)], FakeEncoder(), tmp_path)
    assert len(made) == 2

"""A backend for tests, without a model: it hears tones as words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from narrows import listen
from narrows.retrieve.audio import RATE, Wave
from narrows.retrieve.hearing import BACKENDS, Heard
from tiny_sound import loud, tone

WORDS = {300: "harbour", 450: "bridge", 600: "bread", 750: "penguin"}
"""What tones of so many hertz mean."""


def talk(*words: str, pause: float = 2.5) -> Wave:
    """A second of tone for each word, and silence behind each."""
    hertz = {word: h for h, word in WORDS.items()}
    silence = np.zeros(round(pause * RATE), np.float32)
    return np.concatenate([part for w in words for part in (tone(1.0, hertz[w]), silence)])


class Ear:
    """Hears each clip as the word of its tone. ``clips`` counts what it heard."""

    def __init__(
        self, hears: str = "ear 1", encodes: str = "mind 1", verbatim: str = "yes"
    ) -> None:
        self.hears = hears
        self.encodes = encodes
        self.verbatim = verbatim == "yes"
        self.clips = 0

    def hear(self, waves: Sequence[Wave]) -> list[Heard]:
        self.clips += len(waves)
        return [self._heard(word_of(wave)) for wave in waves]

    def embed(self, question: str) -> NDArray[np.float32]:
        vector = np.array([float(word in question.lower()) for word in WORDS.values()], np.float32)
        return vector / max(1.0, float(np.linalg.norm(vector)))

    def pieces(self, question: str) -> list[int]:
        return [place for place, word in enumerate(WORDS.values()) if word in question.lower()]

    def _heard(self, word: str) -> Heard:
        place = list(WORDS.values()).index(word)
        return Heard(f"the {word}", np.array([place], np.int32), self.embed(word))


def word_of(wave: Wave) -> str:
    """The word of a clip's loudest tone."""
    strength = np.abs(np.fft.rfft(wave))
    hertz = float(np.argmax(strength)) * RATE / len(wave)
    return WORDS[min(WORDS, key=lambda known: abs(known - hertz))]


def instead_of_models(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[Ear]:
    """Put an Ear and a detector of loudness where models would be; the ears that get made."""
    made: list[Ear] = []

    def ear(**options: str) -> Ear:
        made.append(Ear(**options))
        return made[-1]

    monkeypatch.setenv("NARROWS_CACHE", str(cache))
    monkeypatch.setitem(BACKENDS._targets, "transcript", ear)
    monkeypatch.setattr(listen, "Silero", lambda: loud)
    return made

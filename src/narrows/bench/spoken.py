"""Clips of speech with the questions that they answer, to measure listening on.

Synthetic voices that no training hears speak stretches of articles that no training sees (see
``narrows.train.spoken_text``). Beside them stand recordings of people: LJSpeech's reader, whose
clips have questions here, and the digits of fsdd, each said alone, which have none.
"""

from __future__ import annotations

import random
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from narrows.bench.ljspeech import QUESTIONS
from narrows.data import find, read_rows
from narrows.errors import ConfigError, InputError
from narrows.retrieve.audio import RATE, Wave, read_audio
from narrows.retrieve.clips import LONGEST_S
from narrows.train.speech import HELD_VOICES, SPEEDS, VOICES, speak, with_noise
from narrows.train.spoken_text import asked, verbalised, words_of

HUMAN, DIGITS = "ljspeech", "fsdd"
TILT = 1.0
"""Of the noise: its power falls as the frequency rises."""

WRITTEN_WRONG = (23, 44, 54)
"""Per cent of words, in Spoken-SQuAD's three versions."""

Question = tuple[str, tuple[str, ...]]
"""What is asked, and the right answers; none are known of the human voices."""


@dataclass(frozen=True, slots=True, eq=False)
class Spoken:
    """A clip: what is said as ``text``, lower-case words, and as ``wave``, by which ``voice``, of
    which ``article``; and the ``questions`` it answers."""

    text: str
    voice: str
    article: str
    questions: tuple[Question, ...]
    wave: Wave

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.wave) / RATE


def synthetic(
    data: Path, count: int, seed: int, voices: Sequence[tuple[str, str]] = HELD_VOICES
) -> list[Spoken]:
    """``count`` held-out stretches that answer questions, each by one of ``voices`` (see
    ``narrows.train.speech.speak``) at some speed. Raises ConfigError for a voice that training
    hears or that is not installed, InputError for data that is missing or has fewer."""
    if heard := {*voices} & {*VOICES}:
        told = ", ".join(sorted(map(" ".join, heard)))
        raise ConfigError(f"training hears {told}: give voices that it does not, such as flite rms")
    unique = {one.text: one for one in asked(data) if one.held and one.questions}
    chance = random.Random(seed)
    listed = sorted(unique.values(), key=lambda one: one.text)
    chance.shuffle(listed)
    made: list[Spoken] = []
    for one in listed:
        if len(made) == count:
            return made
        voice = chance.choice(voices)
        wave = speak(one.text, voice, chance.uniform(*SPEEDS))
        if len(wave) <= LONGEST_S * RATE:
            name = " ".join(voice)
            made.append(Spoken(words_of(one.text), name, one.article, one.questions, wave))
    if len(made) < count:
        raise InputError(f"{data} has {len(made)} held-out clips with questions, not {count}")
    return made


def human(data: Path) -> list[Spoken]:
    """LJSpeech's clips, most of them with a question. Raises InputError where they are missing."""
    folder = find(data, "ljspeech/transcripts").parent
    made = []
    for row in read_rows(folder / "transcripts.jsonl"):
        wave = np.concatenate([*read_audio(folder / f"{row['id']}.flac")])
        question = QUESTIONS.get(row["id"])
        questions: tuple[Question, ...] = ((question, ()),) if question else ()
        words = words_of(verbalised(row["normalized"]))
        made.append(Spoken(words, HUMAN, row["id"], questions, wave))
    return made


def digits(data: Path, count: int, seed: int) -> list[Spoken]:
    """``count`` of fsdd's recordings. Raises InputError where they are missing."""
    packed = data / "fsdd" / "recordings.tar.gz"
    try:
        with tarfile.open(packed) as tar, tempfile.TemporaryDirectory() as place:
            names = sorted(m.name for m in tar.getmembers() if m.name.endswith(".wav"))
            made = []
            for name in random.Random(seed).sample(names, min(count, len(names))):
                tar.extract(name, place, filter="data")
                wave = np.concatenate([*read_audio(Path(place) / name)])
                digit, *_ = Path(name).name.split("_")
                made.append(Spoken(words_of(verbalised(digit)), DIGITS, name, (), wave))
            return made
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read {packed}: {error}") from None


def misheard(data: Path, count: int, seed: int) -> dict[str, list[Spoken]]:
    """``count`` passages of Spoken-SQuAD as other recognisers wrote them, at each of three shares
    of wrong words, without their sound. Raises InputError where they are missing."""
    questions: dict[str, list[Question]] = {}
    for row in read_rows(find(data, "spoken_squad/questions")):
        asked = (row["question"], tuple(row["answers"]))
        questions.setdefault(row["pid"], []).append(asked)
    rows = [r for r in read_rows(find(data, "spoken_squad/passages")) if r["pid"] in questions]
    rows = random.Random(seed).sample(rows, min(count, len(rows)))
    nothing = np.zeros(0, np.float32)
    return {
        f"{share} % of words wrong": [
            Spoken(row[f"asr_wer{share}"], "", row["title"], tuple(questions[row["pid"]]), nothing)
            for row in rows
        ]
        for share in WRITTEN_WRONG
    }


def noisy(clips: list[Spoken], decibels: float | None, seed: int) -> list[Spoken]:
    """The clips with noise so many decibels below each voice; None leaves them as they are."""
    if decibels is None:
        return clips
    return [
        replace(one, wave=with_noise(one.wave, decibels, np.random.default_rng([seed, i]), TILT))
        for i, one in enumerate(clips)
    ]

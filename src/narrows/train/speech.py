"""Speech made to train and test a recogniser, kept as a speech encoder's states of it.

Synthetic voices (flite's and espeak-ng's) speak the stretches of ``narrows.train.spoken_text``, at
different speeds, some with noise or through a telephone's band. Waves are not kept: the encoder is
frozen, so its states, in float16, are all that training needs.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrows.errors import ConfigError, InputError, ModelError, reason
from narrows.files import replacing
from narrows.retrieve.audio import RATE, Wave, read_audio
from narrows.retrieve.clips import LONGEST_S
from narrows.retrieve.speech_encoder import SpeechEncoder
from narrows.train.spoken_text import Stretch, words_of

PART = 64
"""Clips kept in one file."""
FLITE, ESPEAK, HIBARI = "flite", "espeak-ng", "hibari"
VOICES = (
    *((FLITE, voice) for voice in ("slt", "awb", "slt", "awb", "kal16")),
    *((ESPEAK, voice) for voice in ("en-us+f2", "en-gb+m3", "en-gb-scotland+f4")),
    *((ESPEAK, voice) for voice in ("en-gb-x-gbclan+m1", "en-029+f3", "en-us-nyc+m7")),
)
"""Those that training hears, the better ones more often."""
HELD_VOICES = ((FLITE, "rms"), (FLITE, "rms"), (ESPEAK, "en-gb-x-rp+f5"))
"""Those that only tests hear."""
SPEEDS = (0.85, 1.2)
NOISY, NARROW_BAND = 0.35, 0.15
"""Shares of the clips with noise, and with the band of a telephone."""
SOUND = (5.0, 25.0)
"""Decibels of speech above noise."""
BAND = (300.0, 3400.0)
ESPEAK_WORDS = 165
"""Words a minute at speed 1."""


@dataclass(frozen=True, slots=True)
class Clip:
    """What is known of a clip: the ``words`` spoken, by whom, and of its stretch."""

    words: str
    voice: str
    article: str
    question: str
    held: bool


class SpeechSet:
    """Clips and their states, from the files ``speak_all`` wrote. States are read when asked for:
    the files may be larger than memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.clips: list[Clip] = []
        self._places: list[tuple[int, int, int]] = []
        self._files: list[Any] = []
        for number, path in enumerate(paths):
            try:
                file: Any = safe_open(path, "pt")
                clips = [Clip(**one) for one in json.loads(file.metadata()["clips"])]
                ends = file.get_tensor("ends").tolist()
            except Exception as error:
                raise ModelError(
                    f"{path} is damaged ({error}); delete it to make it again"
                ) from None
            self._files.append(file.get_slice("states"))
            self.clips += clips
            starts = [0, *ends[:-1]]
            self._places += [(number, a, b) for a, b in zip(starts, ends, strict=True)]

    def __len__(self) -> int:
        return len(self.clips)

    def states(self, index: int) -> Tensor:
        """Float16 ``[T, size]``."""
        number, start, stop = self._places[index]
        states: Tensor = self._files[number][start:stop]
        return states

    def length(self, index: int) -> int:
        """``T``."""
        _, start, stop = self._places[index]
        return stop - start


def speak_all(
    stretches: Sequence[Stretch],
    encoder: SpeechEncoder,
    folder: Path,
    *,
    seed: int = 0,
    on_done: Callable[[int], None] = lambda count: None,
) -> SpeechSet:
    """Every stretch spoken once and encoded, kept in ``folder`` part by part, so that a run that
    was stopped goes on. Held-out stretches are spoken by held-out voices.

    Raises ConfigError where the voices are not installed, InputError if ``folder`` holds another
    run's parts, ModelError if one is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, len(stretches), PART):
        some = stretches[first : first + PART]
        path = folder / f"part-{first // PART:05d}.safetensors"
        origin = _origin(some, encoder.name, seed)
        if not path.exists():
            _write(path, some, encoder, origin)
        elif _told_origin(path) != origin:
            raise InputError(
                f"{path} was made from other texts, voices or by another encoder; give another "
                "folder"
            )
        paths.append(path)
        on_done(len(some))
    return SpeechSet(paths)


def speak(text: str, voice: tuple[str, str], speed: float = 1.0) -> Wave:
    """``text`` spoken, float32 ``[n]`` at ``RATE``, by a voice of flite, espeak-ng or HIBARI, a
    package of neural voices. Raises ConfigError for another program or where it is not installed,
    InputError if it cannot speak the text."""
    program, name = voice
    if program == HIBARI:
        return _spoken_by_hibari(text, name, speed)
    if program not in (FLITE, ESPEAK):
        raise ConfigError(
            f"no program {program!r} speaks here: a voice is {FLITE}, {ESPEAK} or {HIBARI} and its "
            "name, such as flite rms"
        )
    if shutil.which(program) is None:
        raise ConfigError(
            f"speaking needs {program}, which is not installed: apt-get install {FLITE} {ESPEAK}"
        )
    with tempfile.TemporaryDirectory() as folder:
        written, made = Path(folder) / "text", Path(folder) / "speech.wav"
        written.write_text(text)
        if program == FLITE:
            stretch = f"duration_stretch={1 / speed:.3f}"
            options = ["-voice", name, "--setf", stretch, "-f", str(written), "-o", str(made)]
        else:
            pace = str(round(ESPEAK_WORDS * speed))
            options = ["-v", name, "-s", pace, "-f", str(written), "-w", str(made)]
        run = subprocess.run([program, *options], capture_output=True, text=True)
        if run.returncode or not made.exists():
            raise InputError(f"{program} cannot speak {text[:40]!r}: {run.stderr.strip()[:200]}")
        return np.concatenate([*read_audio(made)])


def _spoken_by_hibari(text: str, name: str, speed: float) -> Wave:
    try:
        reader = _hibari(name)
    except ImportError:
        raise ConfigError("speaking by neural voices needs: pip install hibari-tts") from None
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(f"hibari cannot speak as {name!r}: {reason(error)}; try heart") from None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "speech.wav"
        reader.save(text, str(made), speed=speed, seed=0)
        return np.concatenate([*read_audio(made)])


@cache
def _hibari(name: str) -> Any:
    from hibari import Hibari

    return Hibari(voice=name)


def worn(wave: Wave, chance: random.Random) -> Wave:
    """``wave`` as a microphone or a telephone may give it: at another level, some with noise, some
    with a narrow band."""
    noise = np.random.default_rng(chance.getrandbits(32))
    if chance.random() < NOISY:
        wave = with_noise(wave, chance.uniform(*SOUND), noise, chance.uniform(0.0, 1.0))
    if chance.random() < NARROW_BAND:
        wave = in_band(wave, *BAND)
    peak = float(np.abs(wave).max()) or 1.0
    return wave * np.float32(chance.uniform(0.05, 0.95) / peak)


def with_noise(wave: Wave, decibels: float, noise: np.random.Generator, tilt: float = 0.0) -> Wave:
    """``wave`` with noise ``decibels`` below it; its power falls as frequency to the ``tilt``: 0
    is white, 1 pink."""
    spectrum = np.fft.rfft(noise.standard_normal(len(wave)))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** (tilt / 2)
    added = np.fft.irfft(spectrum, len(wave))
    power = float(np.square(wave).mean()) / max(float(np.square(added).mean()), 1e-20)
    louder = np.sqrt(power / 10 ** (decibels / 10))
    return np.asarray(wave + added * louder, dtype=np.float32)


def in_band(wave: Wave, low: float, high: float) -> Wave:
    """``wave`` with only what lies between two frequencies, in hertz."""
    spectrum = np.fft.rfft(wave)
    places = np.fft.rfftfreq(len(wave), 1 / RATE)
    spectrum[(places < low) | (places > high)] = 0.0
    return np.asarray(np.fft.irfft(spectrum, len(wave)), dtype=np.float32)


def _write(path: Path, some: Sequence[Stretch], encoder: SpeechEncoder, origin: str) -> None:
    states, clips = [], []
    for number, one in enumerate(some):
        chance = random.Random(f"{origin} {number}")
        voice = chance.choice(HELD_VOICES if one.held else VOICES)
        wave = speak(one.text, voice, chance.uniform(*SPEEDS))
        if len(wave) > LONGEST_S * RATE:
            continue
        states.append(encoder.encode([worn(wave, chance)])[0].half())
        clips.append(Clip(words_of(one.text), " ".join(voice), one.article, one.question, one.held))
    ends = torch.tensor([len(s) for s in states]).cumsum(0)
    told = {"origin": origin, "clips": json.dumps([asdict(clip) for clip in clips])}
    with replacing(path) as beside:
        save_file({"states": torch.cat(states), "ends": ends}, beside, metadata=told)


def _origin(some: Sequence[Stretch], encoder: str, seed: int) -> str:
    told = json.dumps([[asdict(one) for one in some], encoder, seed, VOICES, HELD_VOICES])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _told_origin(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("origin")
    except Exception as error:
        raise ModelError(f"{path} is damaged ({error}); delete it to make it again") from None

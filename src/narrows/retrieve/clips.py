"""Cutting a stream of sound into clips, at pauses or in windows of one length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from narrows.errors import ConfigError
from narrows.retrieve.audio import RATE, Wave
from narrows.retrieve.voice import FRAME, Detector

LONGEST_S = 30.0
"""No clip is longer; recognisers read that much at once."""

WANTED_S = 12.0
"""A clip that is this long ends at its next pause."""

PAUSE_S = 0.32
"""What counts as a pause; half of it goes to the clip before, half to the one behind."""

SILENCE_S = 2.0
"""A pause this long ends any clip."""

LEAST_S = 0.1
"""A clip holds at least this much speech; less is a click."""

SPEECH, SILENT = 0.5, 0.35
"""Speech begins at the one probability, and ends below the other."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A stretch of a recording: its sound between ``start`` and ``end``, in seconds."""

    start: float
    end: float
    wave: Wave


def cut(blocks: Iterable[Wave], detect: Detector, *, window: float | None = None) -> Iterator[Clip]:
    """The clips of a stream, in order, none overlapping another, none without speech.

    They end at pauses, each at most LONGEST_S; one without a pause is cut where speech is least
    likely. With ``window``, they are those windows of that many seconds in which somebody speaks;
    the last one may be shorter. Holds one clip at a time, whatever the stream's length.

    Raises ConfigError for a window that is no length up to LONGEST_S.
    """
    if window is not None and not LEAST_S <= window <= LONGEST_S:
        raise ConfigError(f"a window must be {LEAST_S} to {LONGEST_S:g} s (given: {window})")
    frames = _frames(blocks, detect)
    return (
        _pauses(frames)
        if window is None
        else _windows(frames, max(_count(window), math.ceil(LEAST_S * RATE / FRAME)))
    )


def _pauses(frames: Iterable[tuple[Wave, float]]) -> Iterator[Clip]:
    lead = _count(PAUSE_S / 2)
    held = _Held()
    for wave, probability in frames:
        held.add(wave, probability)
        count = len(held.waves)
        spoken = count - held.quiet
        if not spoken:
            held.drop(count - lead)
        elif held.quiet >= _count(SILENCE_S if spoken < _count(WANTED_S) else PAUSE_S):
            yield from held.take(spoken + lead)
        elif count == _count(LONGEST_S):
            half = count // 2
            yield from held.take(half + 1 + int(np.argmin(held.probabilities[half:])))
    yield from held.take(len(held.waves) - max(0, held.quiet - lead))


def _windows(frames: Iterable[tuple[Wave, float]], size: int) -> Iterator[Clip]:
    held = _Held()
    for wave, probability in frames:
        held.add(wave, probability)
        if len(held.waves) == size:
            yield from held.take(size)
    yield from held.take(len(held.waves))


def _frames(blocks: Iterable[Wave], detect: Detector) -> Iterator[tuple[Wave, float]]:
    """The frames of a stream and how likely each is speech. The last may be shorter than others;
    the detector hears silence behind it."""
    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, block])
        whole = len(rest) - len(rest) % FRAME
        yield from zip(rest[:whole].reshape(-1, FRAME), detect(rest[:whole]).tolist(), strict=True)
        rest = rest[whole:]
    if len(rest):
        yield rest, float(detect(np.pad(rest, (0, FRAME - len(rest))))[0])


def _count(seconds: float) -> int:
    """Frames in so many seconds."""
    return int(seconds * RATE / FRAME)


class _Held:
    """Frames that wait to be a clip. ``quiet`` of them, the newest, hold no speech."""

    def __init__(self) -> None:
        self.waves: list[Wave] = []
        self.probabilities: list[float] = []
        self.quiet = 0
        self._spoken: list[bool] = []
        self._first = 0  # frames that came before those held

    def add(self, wave: Wave, probability: float) -> None:
        before = bool(self._spoken) and self._spoken[-1]
        spoken = probability >= (SILENT if before else SPEECH)
        self.waves.append(wave)
        self.probabilities.append(probability)
        self._spoken.append(spoken)
        self.quiet = 0 if spoken else self.quiet + 1

    def drop(self, count: int) -> None:
        """Forget the oldest ``count`` frames, or none if that is below 1."""
        count = max(0, count)
        self._first += count
        for held in (self.waves, self.probabilities, self._spoken):
            del held[:count]
        self.quiet = min(self.quiet, len(self.waves))

    def take(self, count: int) -> Iterator[Clip]:
        """The oldest ``count`` frames as a clip, if there is speech in them; they go either way."""
        spoken, waves = sum(self._spoken[:count]), self.waves[:count]
        start = self._first * FRAME / RATE
        self.drop(count)
        if spoken >= _count(LEAST_S):
            wave = np.concatenate(waves)
            yield Clip(start, start + len(wave) / RATE, wave)

"""What listening costs: seconds of compute for an hour of sound, of one search, and of making an
index, with the memory that takes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from narrows.bench.overhead import interleave, timed
from narrows.bench.report import Row, repeated_row
from narrows.bench.spoken import Spoken
from narrows.errors import ConfigError
from narrows.retrieve.audio import RATE, write_wav
from narrows.retrieve.hearing import Backend, Heard
from narrows.retrieve.speech_index import Recording
from narrows.retrieve.speech_search import MODES, SpeechSearch

HOUR = 3600.0
PROGRAM = """
import atexit
from narrows.bench.limits import most_memory
from narrows.cli import main
atexit.register(lambda: print(most_memory()))
main()
"""
"""Our command line, which at its end tells the most bytes it held."""
PAUSE_S = 0.6
"""Silence between the clips of a long recording."""
SEARCHED = 20
"""Searches of a round."""


def hear_rows(
    backends: dict[str, Backend], clips: Sequence[Spoken], *, rounds: int, **where: Any
) -> list[Row]:
    """Rows of the seconds each backend takes to hear an hour of such clips, median over rounds in
    which they take turns; and how many times as fast as the first of them within a round."""
    waves = [clip.wave for clip in clips]
    hours = sum(clip.seconds for clip in clips) / HOUR
    taken = interleave({n: timed(partial(b.hear, waves)) for n, b in backends.items()}, rounds)
    first = next(iter(taken))
    where = {"part": "time", **where}
    rows = []
    for name, seconds in taken.items():
        an_hour = [each / hours for each in seconds]
        rows.append(repeated_row("listen", name, unit="s", metric="hour", values=an_hour, **where))
        if name != first:
            times = [a / b for a, b in zip(taken[first], seconds, strict=True)]
            where_else = {"versus": first, **where}
            rows.append(
                repeated_row(
                    "listen", name, unit="1", metric="times_as_fast", values=times, **where_else
                )
            )
    return rows


def search_rows(
    name: str,
    backend: Backend,
    texts: Sequence[str],
    questions: Sequence[str],
    count: int,
    *,
    rounds: int,
    seed: int,
    **where: Any,
) -> list[Row]:
    """Rows of the milliseconds of one search among ``count`` clips in each mode, and of putting the
    question into a vector. Texts come again until there are enough; vectors are random."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, len(backend.embed(questions[0])))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nothing = np.zeros(0, np.int32)
    heard = [Heard(t, nothing, v) for t, v in zip(cycle(texts), vectors, strict=False)]
    search = SpeechSearch([Recording("", "", 0.0, np.zeros((count, 2)), heard)])
    asked = [*zip(range(SEARCHED), cycle(questions), strict=False)]

    def embed() -> None:
        for _, question in asked:
            backend.embed(question)

    def find(mode: str) -> None:
        for i, question in asked:
            search.search(question, vectors[i], mode=mode)

    jobs = {"embed the question": timed(embed), **{m: timed(partial(find, m)) for m in MODES}}
    where = {"part": "search", "size": count, **where}
    return [
        repeated_row(
            "listen",
            f"{name} {job}",
            metric="search",
            unit="ms",
            values=[1e3 * each / len(asked) for each in seconds],
            **where,
        )
        for job, seconds in interleave(jobs, rounds).items()
    ]


def index_rows(
    spec: str, clips: Sequence[Spoken], minutes: Sequence[int], **where: Any
) -> list[Row]:
    """Rows of how many times faster than it was said a recording of so many minutes is indexed, in
    a process of its own, its start included, and the most memory that process held. Raises
    ConfigError if it fails."""
    rows = []
    pause = np.zeros(int(PAUSE_S * RATE), np.float32)
    for length in minutes:
        parts, samples = [], 0
        for clip in cycle(clips):
            if samples >= length * 60 * RATE:
                break
            parts += [clip.wave, pause]
            samples += len(clip.wave) + len(pause)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "long.wav"
            write_wav(made, np.concatenate(parts))
            index = str(Path(folder) / "index")
            words = ["listen", "index", str(made), "--backend", spec, "-o", index]
            seconds, peak = _measured(words)
        told = {"part": "index", "minutes": length, **where}
        fast = [samples / RATE / seconds]
        rows += [
            repeated_row("listen", spec, metric="real_time", unit="1", values=fast, **told),
            repeated_row("listen", spec, metric="peak", unit="MiB", values=[peak], **told),
        ]
    return rows


def _measured(words: Sequence[str]) -> tuple[float, float]:
    """Seconds a command of ours takes in a process of its own, and the most MiB it holds."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        told = done.stderr.strip().splitlines()
        raise ConfigError(f"indexing failed: {told[-1] if told else done.returncode}")
    return seconds, int(done.stdout.split()[-1]) / 2**20

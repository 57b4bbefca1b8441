"""``narrows bench listen``: backends that hear, side by side.

Each hears the same clips, in quiet and in noise. Measured are how often a question finds the clip
that answers it, how many words are wrong, what a model answers from the clips found, and the
compute for an hour of sound. ``oracle`` reads what was said instead of hearing it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from narrows.bench.listen_answers import answer_rows
from narrows.bench.listen_cost import hear_rows, index_rows, search_rows
from narrows.bench.listen_find import Hearing, find_rows, gap_rows, share_rows, word_rows
from narrows.bench.progress import Progress
from narrows.bench.provenance import provenance
from narrows.bench.report import Row, with_provenance
from narrows.bench.spoken import Spoken, digits, human, misheard, noisy, synthetic
from narrows.data import locate
from narrows.errors import ConfigError
from narrows.listen import BATCH
from narrows.registry import build
from narrows.retrieve.hearing import BACKENDS, Backend, Heard
from narrows.retrieve.rank import ENCODER
from narrows.retrieve.speech_index import HEADER, Origin, Recording, SpeechIndex
from narrows.retrieve.transcribe import TranscriptBackend
from narrows.train.speech import HELD_VOICES

ORACLE = "oracle"
PARTS = ("find", "words", "errors", "answers", "time", "search", "index")
QUIET = "none"
PART = 64
"""Clips kept together."""
RERANKED = (10, 20)
"""Clips that are ranked again by what the first backend, if it is verbatim, made of them."""


def run(
    *,
    backends: Sequence[str] = ("transcript", "clsr", ORACLE),
    data: Path | None = None,
    parts: Sequence[str] = PARTS,
    clips: int = 720,
    voices: Sequence[str] = (),
    sizes: Sequence[int] = (100, 300),
    noises: Sequence[float] = (10.0, 0.0),
    noisy_clips: int = 300,
    spoken_digits: int = 60,
    misheard_texts: int = 400,
    answers: int = 100,
    model: str = "smollm2-135m",
    timed_clips: int = 32,
    rounds: int = 3,
    searched: int = 10_000,
    minutes: Sequence[int] = (10, 30),
    work: Path | None = None,
    seed: int = 0,
    quick: bool = False,
    show_progress: bool = True,
) -> list[Row]:
    """Measure and return rows (see ``report.row``), provenance included.

    Args:
        backends: specs of ``hearing.BACKENDS``, and ``oracle``; others are compared with the first.
        data: benchmark data; None as ``data.locate``.
        parts: of PARTS.
        clips: synthetic ones, each with at least one question, behind those of the human voice.
        voices: that speak them, program and name, such as "hibari heart"; default: the held-out
            ones of training.
        sizes: smaller collections searched as well: the first of the clips.
        noises: decibels of the voice above noise, in which the first ``noisy_clips`` are heard too,
            for ``find`` and ``words``.
        spoken_digits: recordings of single digits whose words are counted too.
        misheard_texts: passages that other recognisers wrote, searched in ``errors``.
        answers: questions a ``model`` answers from the best clips.
        timed_clips, rounds: clips heard in a round of timing, and rounds.
        searched: clips in the collection whose search is timed.
        minutes: lengths of recordings indexed.
        work: a folder that keeps what was heard, so that a run can be taken up again.
        seed: of clips, voices, noise and bootstrap.
        quick: tiny sizes, to see that all of it works.

    Raises ConfigError, InputError or ModelError.
    """
    if quick:
        clips, sizes, noises, noisy_clips, spoken_digits, answers = 3, (2,), noises[:1], 2, 1, 2
        misheard_texts = 5
        timed_clips, rounds, searched, minutes = 2, 1, 50, (1,)
    ears = _ears(backends)
    counts = (clips, noisy_clips, misheard_texts, answers, timed_clips, rounds, searched)
    _check(parts, (*counts, *sizes, *minutes))
    folder = locate(data)
    spoken: list[Spoken] = []
    if set(parts) - {"errors"}:  # which are texts: nobody need speak for minutes
        people = human(folder)
        told = [_voice(one) for one in voices] or HELD_VOICES
        spoken = (people[:3] if quick else people) + synthetic(folder, clips, seed, told)
    rows: list[Row] = []
    bench = _Bench(ears, seed, work, show_progress)
    if {"find", "words", "answers"} & set(parts):
        hearings = bench.hear(spoken)
        if "find" in parts:
            rows += bench.find(hearings, sizes, QUIET)
        if "words" in parts:
            rows += bench.words(
                [*hearings, *bench.hear(digits(folder, spoken_digits, seed))], QUIET
            )
        if "answers" in parts:
            rows += answer_rows(hearings, model, answers, seed=seed, show_progress=show_progress)
    for level in noises if {"find", "words"} & set(parts) else ():
        hearings = bench.hear(noisy(spoken[:noisy_clips], level, seed))
        noise = f"{level:g} dB"
        if "find" in parts:
            rows += bench.find(hearings, (), noise)
        if "words" in parts:
            rows += bench.words(hearings, noise)
    if "errors" in parts:
        rows += bench.errors(misheard(folder, misheard_texts, seed))
    heard = {name: ear for name, ear in ears.items() if name != ORACLE}
    where = {"model": ENCODER}
    if "time" in parts:
        rows += hear_rows(heard, spoken[-timed_clips:], rounds=rounds, **where)
    if "search" in parts:
        name, ear = next(iter(heard.items()))
        texts = [clip.text for clip in spoken]
        questions = [question for clip in spoken for question, _ in clip.questions]
        rows += search_rows(
            name, ear, texts, questions, searched, rounds=rounds, seed=seed, **where
        )
    if "index" in parts:
        for name in heard:
            rows += index_rows(name, spoken, minutes, **where)
    return with_provenance(rows, {"dtype": "float32", **provenance(seed)})


def summary(rows: Sequence[Row]) -> list[Row]:
    """The rows a table has room for: what is found by the whole collections, at once and within
    ten, and everything else."""
    first = {"recall@1", "recall@10", "recall@1_difference"}
    return [
        r
        for r in rows
        if r["part"] != "find"
        or (r["metric"] in first and r["direction"] == "question" and "length" not in r)
    ]


COLUMNS = ("part", "method", "versus", "noise", "voice", "size", "minutes")
"""Columns of the printed table."""


def curves(rows: Sequence[Row]) -> list[Row]:
    """The rows to draw: questions that find their clip at once by a backend's usual search, over
    noise, a panel a voice, in the collection that was heard in noise too."""
    asked = [
        r
        for r in rows
        if r["metric"] == "recall@1" and r["part"] == "find" and r["direction"] == "question"
    ]
    fused = {r["method"] for r in asked if r["method"].endswith(" fused")}
    searched = tuple(method.removesuffix("fused") for method in fused)
    sizes = [r["size"] for r in asked if r["noise"] != QUIET] or [r["size"] for r in asked]
    return [
        r
        for r in asked
        if "voice" in r
        and r["size"] == max(sizes)
        and (r["method"] in fused or not r["method"].startswith(searched))
    ]


class _Bench:
    """The backends by name, and what is made of all of them."""

    def __init__(
        self, ears: dict[str, Backend], seed: int, work: Path | None, show_progress: bool
    ) -> None:
        self.ears, self.seed, self.work, self.show_progress = ears, seed, work, show_progress

    def hear(self, clips: Sequence[Spoken]) -> list[Hearing]:
        """What each makes of the clips."""
        made = []
        with Progress("clips heard", visible=self.show_progress) as progress:
            progress.expect(len(clips) * len(self.ears))
            for name, ear in self.ears.items():
                kept = None if self.work is None or name == ORACLE else _kept(self.work, name, ear)
                heard: list[Heard] = []
                for first in range(0, len(clips), PART):
                    heard += _heard(clips[first : first + PART], ear, kept)
                    progress.advance(min(PART, len(clips) - first))
                split = ear.pieces
                made.append(Hearing(name, clips, heard, ear.embed, split, verbatim=ear.verbatim))
        return made

    def find(self, hearings: Sequence[Hearing], sizes: Iterable[int], noise: str) -> list[Row]:
        """Rows of what is found by what."""
        told: dict[str, Any] = {"noise": noise, "model": ENCODER, "seed": self.seed}
        by_question = [found for h in hearings for found in h.clips_of_questions()]
        first = hearings[0]
        if first.verbatim:
            others = [h for h in hearings if not h.verbatim]
            by_question += [h.reranked(first, count) for h in others for count in RERANKED]
        rows = find_rows(by_question, **told)
        rows += find_rows([found for h in hearings for found in h.questions_of_clips()], **told)
        for size in sizes:
            smaller = [h.first(size) for h in hearings]
            rows += find_rows([found for h in smaller for found in h.clips_of_questions()], **told)
        return rows + gap_rows(by_question, by_question[0].method, **told)

    def words(self, hearings: Sequence[Hearing], noise: str) -> list[Row]:
        """Rows of the words that are wrong, of those that write words."""
        told: dict[str, Any] = {"noise": noise, "model": ENCODER, "seed": self.seed}
        written = [h for h in hearings if h.name != ORACLE and len(h.modes) > 1]
        return [row for hearing in written for row in word_rows(hearing, **told)]

    def errors(self, texts: Mapping[str, Sequence[Spoken]]) -> list[Row]:
        """Rows of what is found among texts in which so many words are wrong."""
        ear = _Oracle()
        rows: list[Row] = []
        for name, clips in texts.items():
            heard = ear.read([clip.text for clip in clips])
            for found in Hearing(name, clips, heard, ear.embed).clips_of_questions():
                rows += share_rows(found, seed=self.seed, part="errors", model=ENCODER)
        return rows


class _Oracle(TranscriptBackend):
    """Told what was said."""


def _kept(work: Path, name: str, ear: Backend) -> SpeechIndex:
    """Where what a backend hears is kept: an index of parts of the clips."""
    origin = Origin(name, ear.hears, ear.encodes)
    told = hashlib.sha256(f"{origin.hears} {origin.encodes}".encode()).hexdigest()[:16]
    folder = work / told
    return (
        SpeechIndex.open(folder)
        if (folder / HEADER).exists()
        else SpeechIndex.create(folder, origin)
    )


def _heard(clips: Sequence[Spoken], ear: Backend, kept: SpeechIndex | None) -> Sequence[Heard]:
    """What ``ear`` makes of clips, or what it is known to."""
    if isinstance(ear, _Oracle):
        return ear.read([clip.text for clip in clips])
    digest = hashlib.sha256(b"".join(clip.wave.tobytes() for clip in clips)).hexdigest()
    if kept is not None and digest in kept:
        return kept.recording(digest).heard
    heard: list[Heard] = []
    for first in range(0, len(clips), BATCH):
        heard += ear.hear([clip.wave for clip in clips[first : first + BATCH]])
    if kept is not None:
        times = np.cumsum([0.0, *(clip.seconds for clip in clips)])
        spans = np.stack([times[:-1], times[1:]], 1)
        kept.add(Recording(digest, digest, float(times[-1]), spans, heard))
    return heard


def _ears(backends: Sequence[str]) -> dict[str, Backend]:
    if len(set(backends)) < len(backends):
        raise ConfigError("a backend is given twice")
    if not backends or backends[0] == ORACLE:
        raise ConfigError("give a backend first that hears, such as transcript")
    return {spec: _Oracle() if spec == ORACLE else build(BACKENDS, spec) for spec in backends}


def _voice(told: str) -> tuple[str, str]:
    program, _, name = told.partition(" ")
    if not name:
        raise ConfigError(f"voice {told!r} is no program and a voice of it, such as flite rms")
    return program, name


def _check(parts: Sequence[str], counts: Sequence[int]) -> None:
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise ConfigError(f"unknown part {unknown[0]!r} (known: {', '.join(PARTS)})")
    if min(counts) < 1:
        raise ConfigError(
            f"all counts, sizes and minutes must be at least 1 (given: {min(counts)})"
        )

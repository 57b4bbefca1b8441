"""How often a question finds the clip that answers it, a clip the question it answers, and what is
made of the words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.bench.metrics import bootstrap, paired_bootstrap
from narrows.bench.report import Row, row
from narrows.bench.spoken import Spoken
from narrows.retrieve.hearing import NOTHING, Heard
from narrows.retrieve.speech_index import Recording
from narrows.retrieve.speech_search import MODES, SpeechSearch
from narrows.train.clsr import edits
from narrows.train.spoken_text import verbalised, words_of

WITHIN = (1, 5, 10)
"""Places among which the right one counts as found."""
SECONDS = (6.0, 12.0)
"""Clips are told apart by length here."""

Vector = NDArray[np.float32]
Embed = Callable[[str], Vector]
Split = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for: ``text`` and its ``vector``, the numbers of those that are ``right``, and
    the clip it belongs to."""

    text: str
    vector: Vector
    right: frozenset[int]
    clip: Spoken


@dataclass(frozen=True, slots=True)
class Found:
    """Queries and the ``ranks``, from 1, of the first right one, infinite where none is found.
    ``direction`` is "question" (its clip is looked for) or "clip" (its question is), ``method``
    names backend and search mode, ``size`` is that of the collection, in clips."""

    method: str
    direction: str
    size: int
    queries: Sequence[Query]
    ranks: Sequence[float]

    def part(self, chosen: Sequence[int]) -> Found:
        """Some of it."""
        queries = [self.queries[i] for i in chosen]
        return replace(self, queries=queries, ranks=[self.ranks[i] for i in chosen])


class Hearing:
    """What one backend, called ``name``, ``heard`` of ``clips``; it puts questions into vectors by
    ``embed`` and into word pieces by ``pieces``. ``verbatim`` as ``hearing.Backend`` has it."""

    def __init__(
        self,
        name: str,
        clips: Sequence[Spoken],
        heard: Sequence[Heard],
        embed: Embed,
        pieces: Split | None = None,
        *,
        verbatim: bool = True,
    ) -> None:
        self.name, self.clips, self.heard, self.verbatim = name, clips, heard, verbatim
        self.pieces = pieces
        asked = sorted({question for clip in clips for question, _ in clip.questions})
        self.asked = {question: embed(question) for question in asked}

    @property
    def modes(self) -> Sequence[str]:
        """Ways to search it: a backend may make vectors without words."""
        return MODES if any(h.text for h in self.heard) else ("vectors",)

    def first(self, count: int) -> Hearing:
        """The same of the first ``count`` clips."""
        some = self.clips[:count], self.heard[:count]
        asked = self.asked.__getitem__
        return Hearing(self.name, *some, asked, self.pieces, verbatim=self.verbatim)

    def best(self, question: str, k: int) -> list[int]:
        """The ``k`` best clips for one of their questions, in the usual mode."""
        hits = self._search.search(question, self.asked[question], k, mode=self.modes[0])
        return [hit.clip for hit in hits]

    def clips_of_questions(self) -> list[Found]:
        """In each mode, where the first clip is that answers each question."""
        return self._found("question", self._search, self._queries)

    @cached_property
    def _queries(self) -> list[Query]:
        """The questions, and the clips that answer them."""
        answering: dict[str, set[int]] = {}
        for place, clip in enumerate(self.clips):
            for question, _ in clip.questions:
                answering.setdefault(question, set()).add(place)
        return [
            Query(question, self.asked[question], frozenset(right), self.clips[min(right)])
            for question, right in answering.items()
        ]

    def questions_of_clips(self) -> list[Found]:
        """In each mode, where the first question is that each clip answers."""
        places = {question: place for place, question in enumerate(self.asked)}
        nothing = np.zeros(0, np.int32)
        asked = [Heard(question, nothing, vector) for question, vector in self.asked.items()]
        queries = [
            Query(h.text, h.vector, frozenset(places[q] for q, _ in clip.questions), clip)
            for clip, h in zip(self.clips, self.heard, strict=True)
            if clip.questions
        ]
        return self._found("clip", _searching(asked), queries)

    @cached_property
    def _search(self) -> SpeechSearch:
        return _searching(self.heard, self.pieces)

    def reranked(self, writer: Hearing, count: int) -> Found:
        """``clips_of_questions`` of the usual mode, with the best ``count`` clips ranked again by
        what another backend made of them; the others are not found."""
        ranks = []
        for query in self._queries:
            heard = [NOTHING] * len(self.heard)
            for clip in self.best(query.text, count):
                heard[clip] = writer.heard[clip]
            own = replace(query, vector=writer.asked[query.text])
            ranks.append(_rank(_searching(heard, writer.pieces), own, writer.modes[0]))
        method = f"{self.name} {self.modes[0]}, {count} by {writer.name}"
        return Found(method, "question", len(self.clips), self._queries, ranks)

    def _found(self, direction: str, search: SpeechSearch, queries: list[Query]) -> list[Found]:
        made = []
        for mode in self.modes:
            ranks = [_rank(search, query, mode) for query in queries]
            method = f"{self.name} {mode}"
            made.append(Found(method, direction, len(self.clips), queries, ranks))
        return made


def share_rows(one: Found, *, seed: int, part: str = "find", **where: Any) -> list[Row]:
    """Rows of the shares of queries whose right one stands within some places, and of the mean
    reciprocal rank."""
    measures = {f"recall@{k}": [float(r <= k) for r in one.ranks] for k in WITHIN}
    measures["mrr"] = [1 / r for r in one.ranks]
    groups = [query.clip.article for query in one.queries]
    told = {"direction": one.direction, "size": one.size, **where}
    return [
        row(
            "listen",
            method=one.method,
            metric=metric,
            unit="share",
            value=fmean(values),
            interval=bootstrap(values, groups, seed=seed),
            n=len(values),
            part=part,
            **told,
        )
        for metric, values in measures.items()
    ]


def find_rows(found: Iterable[Found], *, seed: int, **where: Any) -> list[Row]:
    """``share_rows`` of all, and of questions also by the voice and length of their clip."""
    rows: list[Row] = []
    for one in found:
        rows += share_rows(one, seed=seed, **where)
        if one.direction == "question":
            for field, value, chosen in _parts(one.queries):
                rows += share_rows(one.part(chosen), seed=seed, **{field: value}, **where)
    return rows


def gap_rows(found: Sequence[Found], versus: str, *, seed: int, **where: Any) -> list[Row]:
    """Rows of by how much more of the same questions find their clip at once than by the method
    ``versus``: of all, and by voice and length."""
    theirs = next(one for one in found if one.method == versus)
    rows: list[Row] = []
    for one in found:
        if one is theirs:
            continue
        rows.append(_gap_row(one, theirs, seed, **where))
        for field, value, chosen in _parts(one.queries):
            own, other = one.part(chosen), theirs.part(chosen)
            rows.append(_gap_row(own, other, seed, **{field: value}, **where))
    return rows


def word_rows(hearing: Hearing, *, seed: int, **where: Any) -> list[Row]:
    """Rows of words wrong for a word said, the mean over the clips of each voice."""
    errors: dict[str, list[float]] = {}
    for clip, heard in zip(hearing.clips, hearing.heard, strict=True):
        said, written = clip.text.split(), words_of(verbalised(heard.text)).split()
        errors.setdefault(clip.voice, []).append(edits(written, said) / len(said))
    return [
        row(
            "listen",
            method=hearing.name,
            metric="word_error",
            unit="share",
            value=fmean(values),
            interval=bootstrap(values, seed=seed),
            n=len(values),
            part="words",
            voice=voice,
            **where,
        )
        for voice, values in errors.items()
    ]


def _searching(heard: Sequence[Heard], pieces: Split | None = None) -> SpeechSearch:
    return SpeechSearch([Recording("", "", 0.0, np.zeros((len(heard), 2)), heard)], pieces)


def _rank(search: SpeechSearch, query: Query, mode: str) -> float:
    if not (query.text.strip() or query.vector.any()):
        return math.inf
    hits = search.search(query.text, query.vector, max(1, len(search)), mode=mode)
    return next((place for place, hit in enumerate(hits, 1) if hit.clip in query.right), math.inf)


def _parts(queries: Sequence[Query]) -> Iterator[tuple[str, str, list[int]]]:
    """Queries by voice, and by the length of their clip."""
    for voice in dict.fromkeys(query.clip.voice for query in queries):
        yield "voice", voice, [i for i, q in enumerate(queries) if q.clip.voice == voice]
    for low, high in pairwise((0.0, *SECONDS, math.inf)):
        inside = [i for i, q in enumerate(queries) if low <= q.clip.seconds < high]
        if inside:
            yield "length", f"{low:g} to {high:g} s", inside


def _gap_row(one: Found, theirs: Found, seed: int, **where: Any) -> Row:
    ours, others = ([float(r <= 1) for r in each.ranks] for each in (one, theirs))
    groups = [query.clip.article for query in one.queries]
    value, interval = paired_bootstrap(ours, others, groups, seed=seed)
    return row(
        "listen",
        method=one.method,
        metric="recall@1_difference",
        unit="share",
        value=value,
        interval=interval,
        n=len(one.ranks),
        part="find",
        versus=theirs.method,
        direction=one.direction,
        size=one.size,
        **where,
    )

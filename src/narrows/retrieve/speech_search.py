"""Finding the clips that answer a question: by vectors, by words, or by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.errors import ConfigError
from narrows.retrieve.guessed import GuessedBM25
from narrows.retrieve.rank import BM25, checked_question
from narrows.retrieve.speech_index import Recording

MODES = ("fused", "vectors", "words")

WORDS = 0.04
"""What a unit of BM25 is worth beside a cosine, in fused search: the best of what was tried on
questions of articles that recognisers learn from. It finds more than summed reciprocal ranks do
(as Bruch, Gai and Ingber found, 2023), since it knows by how much a clip is ahead."""

GUESSED_WORDS = 0.2
"""The same of BM25 over guesses, chosen alike."""
GUESSED_CLIPS = 30_000
"""Clips up to which guesses are looked among: each has hundreds, and all of them are sorted."""

EXACT = 1_000_000
"""Clips up to which every vector is looked at; among more, faiss finds CANDIDATES near ones."""
CANDIDATES = 1000
LINKS, LOOKED_AT = 32, 2 * CANDIDATES
"""Of faiss's graph (HNSW): neighbours of a clip, and clips visited by a search."""

EQUAL = 6
"""Decimals of a cosine that count; the same vector elsewhere in a matrix may differ behind them."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Clip number ``clip`` of the recording ``name``, with ``digest``, from ``start`` to ``end`` in
    seconds. ``score`` is a cosine, BM25's, or both weighed together; higher is better."""

    name: str
    digest: str
    clip: int
    start: float
    end: float
    score: float
    text: str


class SpeechSearch:
    """Searches the clips of ``recordings`` in which something was said.

    Args:
        recordings: what is searched.
        pieces: puts a question into word pieces as those of the clips. Where clips have guesses
            of theirs, words are then looked for among all of these, see ``GuessedBM25``, in up to
            GUESSED_CLIPS of them.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        pieces: Callable[[str], list[int]] | None = None,
    ) -> None:
        self._pieces = pieces
        self._clips = [
            (recording, i)
            for recording in recordings
            for i, heard in enumerate(recording.heard)
            if heard.text.strip() or heard.vector.any()
        ]
        vectors = [recording.heard[i].vector for recording, i in self._clips]
        self._vectors = np.array(vectors, np.float32)

    def __len__(self) -> int:
        return len(self._clips)

    def search(
        self, question: str, vector: NDArray[np.float32], k: int = 5, *, mode: str = "fused"
    ) -> list[Hit]:
        """The ``k`` best clips, best first; of equal ones, the one that was there first.

        Args:
            question: what is asked.
            vector: the same as a unit vector ``[d]`` of the clips' encoder.
            k: most hits.
            mode: ``"vectors"`` scores by cosine, in one matrix product over all clips, or among
                more than EXACT of them over the CANDIDATES that a graph of neighbours leads to;
                ``"words"`` by BM25, and leaves out clips that share no word with the question;
                ``"fused"`` by the cosine plus WORDS, or GUESSED_WORDS, times BM25.

        Raises ConfigError for another mode, a ``k`` below 1 or where faiss is missing, InputError
        for an empty question.
        """
        if mode not in MODES:
            raise ConfigError(f"unknown search mode {mode!r} (known: {', '.join(MODES)})")
        if k < 1:
            raise ConfigError(f"k must be at least 1 (given: {k})")
        if not self._clips:
            return []
        if mode == "vectors":
            scores = self._cosines(vector)
        elif mode == "words":
            scores = self._words(question)
        else:
            words, scores = self._words(question), self._cosines(vector)
            scores[(words > 0) & (scores == -np.inf)] = 0.0  # not looked at, but it has the words
            scores += self._weight * words
        order = np.argsort(-scores, kind="stable")[:k]
        least = 0.0 if mode == "words" else -np.inf
        return [self._hit(i, scores[i]) for i in order if scores[i] > least]

    def _cosines(self, vector: NDArray[np.float32]) -> NDArray[np.float64]:
        """Of every clip; minus infinity for one that was not looked at."""
        cosines: NDArray[np.float64]
        if len(self) <= EXACT:
            cosines = (self._vectors @ vector).astype(np.float64)
            return np.round(cosines, EQUAL)
        cosines = np.full(len(self), -np.inf)
        found, places = self._graph.search(vector[None], min(CANDIDATES, len(self)))
        cosines[places[places >= 0]] = np.round(found[places >= 0], EQUAL)
        return cosines

    @cached_property
    def _graph(self) -> Any:
        try:
            import faiss
        except ImportError:
            raise ConfigError(
                f"searching more than {EXACT:,} clips needs faiss: pip install faiss-cpu"
            ) from None
        graph = faiss.IndexHNSWFlat(self._vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efSearch = LOOKED_AT
        graph.add(self._vectors)
        return graph

    @cached_property
    def _words(self) -> Callable[[str], NDArray[np.float64]]:
        heard = [recording.heard[i] for recording, i in self._clips]
        pieces = self._pieces
        if pieces is None or not self._guessed:
            return BM25().over([one.text for one in heard])
        guessed = GuessedBM25([one.guesses for one in heard if one.guesses is not None])
        return lambda question: guessed.score(pieces(checked_question(question)))

    @property
    def _weight(self) -> float:
        return GUESSED_WORDS if self._guessed else WORDS

    @cached_property
    def _guessed(self) -> bool:
        """Whether words are looked for among guesses."""
        known = all(recording.heard[i].guesses is not None for recording, i in self._clips)
        return self._pieces is not None and known and len(self) <= GUESSED_CLIPS

    def _hit(self, number: int, score: float) -> Hit:
        recording, i = self._clips[number]
        start, end = recording.times[i].tolist()
        text = recording.heard[i].text
        return Hit(recording.name, recording.digest, i, start, end, float(score), text)

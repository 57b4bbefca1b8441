"""Asking recordings: what is said in them is heard once, and then found by questions.

>>> from narrows import listen
>>> listen.index(["lecture.mp3"], "lectures")
>>> for hit in listen.search("lectures", "When was the bridge opened?"):
...     print(hit.name, listen.at(hit.start), hit.text)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from narrows.contracts import Document
from narrows.errors import ConfigError, InputError
from narrows.model.fetch import sha256
from narrows.model.hub import cache_dir
from narrows.registry import build, split_spec
from narrows.retrieve.audio import RATE, Wave, read_audio, read_spans, seconds_of
from narrows.retrieve.clips import cut
from narrows.retrieve.hearing import BACKENDS, NOTHING, Backend, Heard
from narrows.retrieve.speech_index import HEADER, Origin, Recording, SpeechIndex
from narrows.retrieve.speech_search import Hit, SpeechSearch
from narrows.retrieve.voice import Silero

DEFAULT_BACKEND = "transcript"

BATCH = 32
"""Clips that are held and heard together."""

PASSAGES = 3
"""Clips an answer is given from, up to a minute and a half of speech."""

RERANKED = 10
"""Clips that are transcribed for an answer, if the backend's text is not fit to answer from."""


def index(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    backend: str | None = None,
    window: float | None = None,
    on_heard: Callable[[float], None] | None = None,
) -> SpeechIndex:
    """Hear recordings and put them into the index in folder ``out``.

    An index that is there grows: a recording it holds, by the sha256 of its file, is not heard
    again; one whose file has changed takes the place of what it was. Each is in the index once it
    has been heard to its end, so that an interrupted run can be started again.

    Args:
        files: recordings of any length; see ``narrows.retrieve.audio``.
        out: the index's folder.
        backend: a spec of BACKENDS; None for the index's own, or DEFAULT_BACKEND for a new one.
        window: cut clips of so many seconds; None cuts at pauses.
        on_heard: called with seconds of sound as they are read.

    Raises InputError for a file or index that cannot be used, ConfigError for an option that
    cannot be, or an index that another backend made, ModelError.
    """
    for file in files:
        seconds_of(file)  # what cannot be opened is told before anything is heard
    folder = Path(out)
    spec = backend or DEFAULT_BACKEND
    if backend is None and _begun(folder):
        spec = SpeechIndex.open(folder).origin.backend
    spec = _anywhere(spec)
    return _grown(folder, files, spec, build(BACKENDS, spec), window, on_heard)


class Listener:
    """Finds the clips of ``recordings`` that answer questions; ``backend`` has heard them."""

    def __init__(self, recordings: Sequence[Recording], backend: Backend) -> None:
        self._recordings = recordings
        self._clips = SpeechSearch(recordings, backend.pieces)
        self._backend = backend
        self._transcribed: dict[tuple[str, int], Heard] = {}

    @classmethod
    def open(cls, index: str | Path) -> Listener:
        """To all that an index holds. Raises as ``search``."""
        found = SpeechIndex.open(Path(index))
        backend = build(BACKENDS, found.origin.backend)
        found.check(None, backend.encodes)
        return cls(list(found.recordings()), backend)

    @classmethod
    def hear(
        cls,
        files: Sequence[str | Path],
        *,
        backend: str = DEFAULT_BACKEND,
        on_heard: Callable[[float], None] | None = None,
    ) -> Listener:
        """To recordings, each heard once: its index stays in the cache. See ``index`` for the
        arguments and what is raised."""
        for file in files:
            seconds_of(file)
        ear = build(BACKENDS, backend)
        made_by = hashlib.sha256(f"{ear.hears} {ear.encodes}".encode()).hexdigest()[:16]
        recordings = {}
        for file in files:
            digest = _digest(file)
            place = cache_dir() / "listen" / f"{digest[:16]}-{made_by}"
            (recordings[digest],) = _grown(place, [file], backend, ear, None, on_heard).recordings()
        return cls([*recordings.values()], ear)

    def search(
        self, question: str, k: int = 5, *, mode: str = "fused", rerank: int = 0
    ) -> list[Hit]:
        """See ``SpeechSearch.search``. With ``rerank``, so many of the best clips are transcribed
        by Whisper, once each, and these transcripts are searched as all clips were.

        Raises ConfigError for ``rerank`` below 0 or where transcripts were searched already, and
        as ``sound`` where a recording is needed again.
        """
        if rerank < 0:
            raise ConfigError(f"rerank must be at least 0 (given: {rerank})")
        if rerank and self._backend.verbatim:
            raise ConfigError(
                "rerank is for an index of other backends: this one holds transcripts already"
            )
        count = max(k, rerank) if rerank else k
        hits = self._clips.search(question, self._backend.embed(question), count, mode=mode)
        if not rerank:
            return hits
        found = SpeechSearch(self._again(hits))
        return found.search(question, self._writer.embed(question), k, mode=mode)

    def passages(self, question: str, k: int = PASSAGES) -> list[tuple[Document, float]]:
        """The ``k`` best clips, in the order they were said, as documents called
        ``NAME START-END``, each with its score. Raises as ``search``, and as ``sound`` where
        the backend's text is not fit to be read and the recordings are needed again."""
        rerank = 0 if self._backend.verbatim else max(k, RERANKED)
        hits = self.search(question, k, rerank=rerank)
        documents: list[tuple[Document, float]] = []
        for recording in self._recordings:
            file = Path(recording.name)
            chosen = sorted((h for h in hits if h.name == recording.name), key=lambda h: h.clip)
            documents += [
                (Document(f"{file.name} {at(hit.start)}-{at(hit.end)}", hit.text), hit.score)
                for hit in chosen
                if hit.text
            ]
        return documents

    @cached_property
    def _writer(self) -> Backend:
        """The recogniser that writes best."""
        return build(BACKENDS, "transcript")

    def _again(self, hits: Sequence[Hit]) -> list[Recording]:
        """The recordings of hits, in which only these were heard, and transcribed."""
        made = []
        for recording in self._recordings:
            chosen = [hit for hit in hits if hit.digest == recording.digest]
            new = [h for h in chosen if (h.digest, h.clip) not in self._transcribed]
            if new:
                spans = [(h.start, h.end) for h in new]
                waves = sound(recording.name, recording.digest, spans)
                for hit, heard in zip(new, self._writer.hear(waves), strict=True):
                    self._transcribed[hit.digest, hit.clip] = heard
            heard_again = [NOTHING] * len(recording.heard)
            for hit in chosen:
                heard_again[hit.clip] = self._transcribed[hit.digest, hit.clip]
            made.append(replace(recording, heard=heard_again))
        return made


def search(
    index: str | Path, question: str, k: int = 5, *, mode: str = "fused", rerank: int = 0
) -> list[Hit]:
    """The ``k`` best clips of an index, best first; see ``SpeechSearch.search`` for ``mode`` and
    ``Listener.search`` for ``rerank``. For many questions, keep a Listener.

    Raises InputError for an empty question or an index that cannot be read, ConfigError for an
    option that cannot be or an index of another encoder, ModelError.
    """
    return Listener.open(index).search(question, k, mode=mode, rerank=rerank)


def sound(name: str, digest: str, spans: Sequence[tuple[float, float]]) -> list[Wave]:
    """The sound of a recording between pairs of seconds, as ``read_spans``. Raises InputError where
    the file ``name`` is no longer the one of that ``digest``, and as ``read_audio``."""
    if _digest(name) != digest:
        raise InputError(f"{name} is not the recording that was heard: index it again")
    return read_spans(name, spans)


def at(seconds: float) -> str:
    """A time in a recording: ``12:31``, or ``1:12:31``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _anywhere(spec: str) -> str:
    """A backend's spec in which folders have their full names: an index is searched from others,
    too. One with a comma, which no spec can hold, stays as it is."""
    name, options = split_spec(BACKENDS.kind, spec)
    told = []
    for option, value in options.items():
        full = os.path.abspath(value)
        told.append(f"{option}={full if os.path.isdir(value) and ',' not in full else value}")
    return f"{name}:{','.join(told)}" if told else name


def _begun(folder: Path) -> bool:
    """Whether there is an index."""
    try:
        return (folder / HEADER).exists()
    except OSError as error:
        raise InputError(
            f"{folder} can be no index ({error.strerror}): name another folder"
        ) from None


def _digest(file: str | Path) -> str:
    try:
        return sha256(Path(file))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check the path") from None


def _grown(
    folder: Path,
    files: Sequence[str | Path],
    spec: str,
    ear: Backend,
    window: float | None,
    on_heard: Callable[[float], None] | None,
) -> SpeechIndex:
    """The index in ``folder``, made if there is none, with those recordings in it."""
    new = not _begun(folder)
    if new:
        made = SpeechIndex.create(folder, Origin(spec, ear.hears, ear.encodes))
    else:
        made = SpeechIndex.open(folder)
    made.check(ear.hears, ear.encodes)
    try:
        for file in files:
            digest = _digest(file)
            if digest not in made:
                made.add(_hear(Path(file), digest, ear, window, on_heard))
                continue
            entry = next(e for e in made.entries if e.digest == digest)
            if entry.name != os.path.abspath(file):
                made.rename(digest, os.path.abspath(file))
            if on_heard:
                on_heard(entry.seconds)
    except BaseException:
        if new:  # what could not hear is not kept as what an index is heard by
            made.discard()
        raise
    return made


def _hear(
    file: Path,
    digest: str,
    ear: Backend,
    window: float | None,
    on_heard: Callable[[float], None] | None,
) -> Recording:
    """All clips of a recording, heard a few at a time."""
    samples = 0

    def blocks() -> Iterator[Wave]:
        nonlocal samples
        for block in read_audio(file):
            samples += len(block)
            if on_heard:
                on_heard(len(block) / RATE)
            yield block

    clips = cut(blocks(), Silero(), window=window)
    times: list[tuple[float, float]] = []
    heard: list[Heard] = []
    while batch := list(islice(clips, BATCH)):
        heard += ear.hear([clip.wave for clip in batch])
        times += [(clip.start, clip.end) for clip in batch]
    array = np.array(times).reshape(-1, 2)
    return Recording(digest, os.path.abspath(file), samples / RATE, array, heard)

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
from itertools import islice
from pathlib import Path

import numpy as np

from narrows.contracts import Document
from narrows.model.fetch import sha256
from narrows.model.hub import cache_dir
from narrows.registry import build
from narrows.retrieve.audio import RATE, Wave, read_audio, read_spans, seconds_of
from narrows.retrieve.clips import cut
from narrows.retrieve.hearing import BACKENDS, Backend, Heard
from narrows.retrieve.speech_index import HEADER, Origin, Recording, SpeechIndex
from narrows.retrieve.speech_search import Hit, SpeechSearch
from narrows.retrieve.transcribe import Transcriber
from narrows.retrieve.voice import Silero

DEFAULT_BACKEND = "transcript"

BATCH = 8
"""Clips that are held and heard together."""

PASSAGES = 8
"""Clips an answer is given from, a minute or two of speech."""


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
    found = SpeechIndex.open(folder) if (folder / HEADER).exists() else None
    spec = backend or (found.origin.backend if found else DEFAULT_BACKEND)
    ear = build(BACKENDS, spec)
    made = found or SpeechIndex.create(folder, Origin(spec, ear.hears, ear.encodes))
    made.check(ear.hears, ear.encodes)
    for file in files:
        digest = sha256(Path(file))
        if digest not in made:
            made.add(_hear(Path(file), digest, ear, window, on_heard))
        elif on_heard:
            on_heard(next(e.seconds for e in made.entries if e.digest == digest))
    return made


class Listener:
    """Finds the clips of ``recordings`` that answer questions; ``backend`` has heard them."""

    def __init__(self, recordings: Sequence[Recording], backend: Backend) -> None:
        self._clips = SpeechSearch(recordings)
        self._backend = backend

    @classmethod
    def open(cls, index: str | Path) -> Listener:
        """Of all that an index holds. Raises as ``search``."""
        found = SpeechIndex.open(Path(index))
        backend = build(BACKENDS, found.origin.backend)
        found.check(None, backend.encodes)
        return cls(list(found.recordings()), backend)

    def search(self, question: str, k: int = 5, *, mode: str = "fused") -> list[Hit]:
        """See ``SpeechSearch.search``."""
        return self._clips.search(question, self._backend.embed(question), k, mode=mode)


def search(index: str | Path, question: str, k: int = 5, *, mode: str = "fused") -> list[Hit]:
    """The ``k`` best clips of an index, best first; see ``SpeechSearch.search`` for ``mode``. For
    many questions, keep a Listener.

    Raises InputError for an empty question or an index that cannot be read, ConfigError for an
    option that cannot be or an index of another encoder, ModelError.
    """
    return Listener.open(index).search(question, k, mode=mode)


def passages(
    question: str,
    files: Sequence[str | Path],
    *,
    k: int = PASSAGES,
    backend: str = DEFAULT_BACKEND,
) -> list[tuple[Document, float]]:
    """What is said about a question in recordings: the ``k`` best clips, in the order they were
    said, as documents called ``NAME START-END``, each with its score. Each recording is heard
    once; its index stays in the cache. Raises as ``index`` and ``search``.
    """
    ear = build(BACKENDS, backend)
    made_by = hashlib.sha256(f"{ear.hears} {ear.encodes}".encode()).hexdigest()[:16]
    heard: dict[Path, Recording] = {}
    for file in map(Path, files):
        seconds_of(file)  # what cannot be opened is told before it is read
        place = cache_dir() / "listen" / f"{sha256(file)[:16]}-{made_by}"
        heard[file] = next(index([file], place, backend=backend).recordings())
    hits = Listener(list(heard.values()), ear).search(question, k)
    documents: list[tuple[Document, float]] = []
    for file, recording in heard.items():
        chosen = sorted((h for h in hits if h.digest == recording.digest), key=lambda h: h.clip)
        texts = [h.text for h in chosen] if ear.verbatim else _written(file, chosen)
        documents += [
            (Document(f"{file.name} {at(hit.start)}-{at(hit.end)}", text), hit.score)
            for hit, text in zip(chosen, texts, strict=True)
            if text
        ]
    return documents


def at(seconds: float) -> str:
    """A time in a recording: ``12:31``, or ``1:12:31``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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


def _written(file: Path, hits: Sequence[Hit]) -> list[str]:
    """What the recogniser that writes best makes of the clips."""
    waves = read_spans(file, [(hit.start, hit.end) for hit in hits])
    return [transcript.text for transcript in Transcriber.load()(waves)] if hits else []

"""Transcribing clips by Whisper, and the backend that searches what Whisper wrote."""

from __future__ import annotations

import bisect
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from narrows.errors import ConfigError, InputError, ModelError, reason
from narrows.model import ctranslate2, hub
from narrows.retrieve.audio import RATE, Wave
from narrows.retrieve.clips import LEAST_S, LONGEST_S
from narrows.retrieve.hearing import Heard
from narrows.retrieve.rank import ENCODER, Embedder, checked_question

RECOGNISER = "whisper-base"

MAX_TOKENS = 224
"""Written for one clip at most, half of what Whisper could: what goes on longer goes in circles."""

TAIL_S = 4.0
"""Silence behind the longest clip of a batch, in seconds. Whisper itself fills every clip up to
30 s: of short ones that takes more than half of the time, and as many words are wrong. Behind 2 s
it still writes as well, but some noise is taken for speech."""

WINDOW_S = 15.0
"""Least length of a batch with its silence, in seconds: in less, Whisper says a lone word again and
again."""

FRAMES = 100
"""Of Whisper's features, in a second."""

NO_SPEECH, UNSURE, CIRCLES = 0.6, -1.0, 2.4
"""A clip is taken for silence above this probability of it, where the mean log-probability of what
was written is below the second, Whisper's own rule, or where this goes in circles: where zlib makes
it shorter by more than the third, of which Whisper would try again."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A phrase of a clip, ``start`` and ``end`` in seconds of the clip."""

    start: float
    end: float
    text: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is said in a clip, phrase by phrase; nothing if nobody speaks."""

    segments: tuple[Segment, ...] = ()

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(segment.text for segment in self.segments)


class Transcriber:
    """Whisper in CTranslate2's form, several clips at once.

    Args:
        model: faster-whisper's ``WhisperModel``.
        language: its code, such as ``"en"``; None listens to the first 30 s that it is given.
        beam: transcripts kept while searching; 1 is greedy.
        batch: clips that are read together.
        workers: batches that are read at the same time.

    Raises ConfigError for a language it does not know or a beam below 1.
    """

    def __init__(
        self,
        model: Any,
        *,
        language: str | None = None,
        beam: int = 1,
        batch: int = 8,
        workers: int = 1,
    ) -> None:
        from faster_whisper import BatchedInferencePipeline

        if language is not None and language not in model.supported_languages:
            raise ConfigError(f"the recogniser knows no language {language!r}; give a code like en")
        if beam < 1:
            raise ConfigError(f"beam must be at least 1 (given: {beam})")
        self.language = language
        self.beam = beam
        self.batch = batch
        self.workers = workers
        self._model = model
        self._pipeline = BatchedInferencePipeline(model)

    @classmethod
    def load(
        cls,
        name: str = RECOGNISER,
        *,
        language: str | None = None,
        beam: int = 1,
        tail: float = TAIL_S,
    ) -> Self:
        """Load by name or folder (see ``narrows.model.hub.resolve``), onto CUDA where there is
        one; in 8 bits on a CPU. ``tail``: see TAIL_S; 30 leaves all as faster-whisper does it:
        every clip filled up to 30 s, batches encoded together and one after the other. Raises
        ModelError or ConfigError."""
        try:
            from ctranslate2 import get_cuda_device_count
            from faster_whisper import WhisperModel
        except ImportError:
            raise ConfigError(
                "transcribing needs faster-whisper: pip install 'narrows[listen]'"
            ) from None
        folder = hub.resolve(name)
        if not ctranslate2.is_model(folder / ctranslate2.WEIGHTS):
            raise ModelError(f"{name} is no Whisper in CTranslate2's form; try {RECOGNISER}")
        try:
            with crew() as (workers, threads):
                if tail == LONGEST_S or get_cuda_device_count():
                    workers, threads = 1, 0
                model = WhisperModel(
                    str(folder),
                    compute_type="auto",
                    local_files_only=True,
                    num_workers=workers,
                    cpu_threads=threads,
                )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"cannot read the recogniser in {folder}: {reason(error)}") from error
        if tail < LONGEST_S:
            model.encode = partial(_encoded, model.encode, tail, model.model.device == "cpu")
        return cls(model, language=language, beam=beam, workers=workers)

    def __call__(self, waves: Sequence[Wave]) -> list[Transcript]:
        """What is said in each clip. Raises InputError for one longer than LONGEST_S."""
        if any(len(wave) > LONGEST_S * RATE for wave in waves):
            raise InputError(f"a clip is longer than {LONGEST_S:g} s; cut it into shorter ones")
        made = [Transcript() for _ in waves]
        spoken = [i for i, w in enumerate(waves) if len(w) >= LEAST_S * RATE and w.any()]
        if not spoken:
            return made
        language = self.language or self._language([waves[i] for i in spoken])
        # All of a batch take as long as its longest; the batches that take longest go first.
        spoken.sort(key=lambda i: -len(waves[i]))
        parts = [spoken[at : at + self.batch] for at in range(0, len(spoken), self.batch)]
        clips = [[waves[i] for i in part] for part in parts]
        with ThreadPoolExecutor(self.workers) as pool:
            read = pool.map(partial(self._batch, language), clips)
            for part, found in zip(parts, read, strict=True):
                for i, transcript in zip(part, found, strict=True):
                    made[i] = transcript
        return made

    def _language(self, waves: Sequence[Wave]) -> str:
        """That of the first LONGEST_S seconds; a model of English alone knows no other."""
        if len(known := self._model.supported_languages) == 1:
            return str(known[0])
        first = np.concatenate(waves)[: round(LONGEST_S * RATE)]
        found: str = self._model.detect_language(first)[0]
        return found

    def _batch(self, language: str, waves: Sequence[Wave]) -> list[Transcript]:
        """The clips go in end to end, with the places of each, and so come out."""
        ends = np.cumsum([len(wave) for wave in waves]) / RATE
        starts = [0.0, *ends[:-1].tolist()]
        places = [{"start": a, "end": b} for a, b in zip(starts, ends.tolist(), strict=True)]
        written, _ = self._pipeline.transcribe(
            np.concatenate(waves),
            language=language,
            clip_timestamps=places,
            batch_size=len(waves),
            beam_size=self.beam,
            temperature=0.0,
            without_timestamps=False,
            max_new_tokens=MAX_TOKENS,
        )
        found: list[list[Segment]] = [[] for _ in waves]
        silent = [False for _ in waves]
        for segment in written:
            text = segment.text.strip()
            # Times may be wrong, but the hundredth of a second where its clip begins is known.
            i = bisect.bisect(starts, segment.seek / 100 + 0.01) - 1
            silent[i] = segment.no_speech_prob > NO_SPEECH
            if not text or (silent[i] and segment.avg_logprob < UNSURE):
                continue
            length = len(waves[i]) / RATE
            start, end = (
                min(max(0.0, t - starts[i]), length) for t in (segment.start, segment.end)
            )
            found[i].append(Segment(start, end, text))
        made = [Transcript(tuple(segments)) for segments in found]
        return [
            Transcript() if quiet and _in_circles(one.text) else one
            for one, quiet in zip(made, silent, strict=True)
        ]


def _in_circles(text: str) -> bool:
    data = text.encode()
    return len(data) > CIRCLES * len(zlib.compress(data))


@contextmanager
def crew() -> Iterator[tuple[int, int]]:
    """Where a model of CTranslate2 is loaded: workers that read clips on a CPU, and the threads of
    each. Two workers with half of the threads get done more than one with all."""
    threads = torch.get_num_threads()
    workers = min(2, threads)
    try:
        yield workers, threads // workers
    finally:
        torch.set_num_threads(threads)  # which loading made those of a worker


def _encoded(
    encode: Callable[[NDArray[np.float32]], Any],
    tail: float,
    singly: bool,
    features: NDArray[np.float32],
) -> Any:
    """What ``encode`` makes of features ``[..., T]`` that are ``shortened``. ``singly`` has it
    encode clip after clip: together they do not fit the caches of a CPU, and take twice as long."""
    short = shortened(features, tail)
    if not singly:
        return encode(short)
    from ctranslate2 import StorageView

    clips = short.reshape(-1, *short.shape[-2:])
    return StorageView.from_array(np.concatenate([np.array(encode(one)) for one in clips]))


def shortened(features: NDArray[np.float32], tail: float) -> NDArray[np.float32]:
    """``[..., T]`` without the zeros that all clips are filled up with, up to ``tail`` seconds of
    them, at least WINDOW_S and whole seconds in all: what runs them keeps code for every length."""
    filled = np.flatnonzero(features.reshape(-1, features.shape[-1]).any(0))
    if not len(filled):
        return features
    seconds = math.ceil(max((filled[-1] + 1) / FRAMES + tail, WINDOW_S))
    return np.ascontiguousarray(features[..., : seconds * FRAMES])


class TranscriptBackend:
    """Searches what a recogniser writes, by a sentence encoder. See ``hearing.Backend``.

    Args:
        recogniser, encoder: their names or folders, loaded at first use.
        language, beam, tail: see ``Transcriber.load``.

    Raises ConfigError for a beam or tail that cannot be; ModelError or ConfigError when models
    are used.
    """

    verbatim = True

    def __init__(
        self,
        recogniser: str = RECOGNISER,
        encoder: str = ENCODER,
        language: str | None = None,
        beam: str = "1",
        tail: str = f"{TAIL_S:g}",
    ) -> None:
        if not beam.isdecimal() or not int(beam):
            raise ConfigError(f"beam must be a whole number from 1 on (given: {beam!r})")
        try:
            self._tail = float(tail)
        except ValueError:
            self._tail = -1.0
        if not 0 <= self._tail <= LONGEST_S:
            raise ConfigError(f"tail must be 0 to {LONGEST_S:g} seconds (given: {tail!r})")
        self._beam = int(beam)
        self._recogniser = recogniser
        self._encoder = encoder
        self._language = language

    @cached_property
    def transcriber(self) -> Transcriber:
        """The recogniser."""
        how: dict[str, Any] = {"language": self._language, "beam": self._beam, "tail": self._tail}
        return Transcriber.load(self._recogniser, **how)

    @cached_property
    def embedder(self) -> Embedder:
        """The sentence encoder."""
        return Embedder.load(self._encoder)

    @cached_property
    def hears(self) -> str:
        """See ``hearing.Backend``."""
        beam = f" beam {self._beam}" if self._beam > 1 else ""
        tail = f" tail {self._tail:g} window {WINDOW_S:g}"
        language = f" language {self._language}" if self._language else ""
        revision = hub.revision(hub.resolve(self._recogniser))
        return f"{self._recogniser} {revision}{beam}{tail}{language}"

    @cached_property
    def encodes(self) -> str:
        """See ``hearing.Backend``."""
        return f"{self._encoder} {hub.revision(hub.resolve(self._encoder))}"

    def hear(self, waves: Sequence[Wave]) -> list[Heard]:
        """See ``hearing.Backend``."""
        return self.read([transcript.text for transcript in self.transcriber(waves)])

    def read(self, texts: Sequence[str]) -> list[Heard]:
        """Texts as if they had been heard. What the encoder cannot read of a long one has no part
        in its vector."""
        vectors = self.embedder.embed(texts)
        return [
            Heard(
                text,
                np.array(self.embedder.pieces(text), np.int32),
                vector if text else np.zeros_like(vector),
            )
            for text, vector in zip(texts, vectors, strict=True)
        ]

    def embed(self, question: str) -> NDArray[np.float32]:
        """See ``hearing.Backend``."""
        vector: NDArray[np.float32] = self.embedder.embed([checked_question(question)])[0]
        return vector

    def pieces(self, question: str) -> list[int]:
        """See ``hearing.Backend``."""
        return self.embedder.pieces(question)

"""What a speech encoder makes of a clip: states, one every 20 ms.

Whisper's encoder, run by CTranslate2 in 8 bits. A clip is encoded alone and as long as it is, where
Whisper itself fills every clip up to 30 seconds: short clips cost what they are long, and a
recogniser is trained on states of the same kind. The last sample is followed by 10 ms of silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from narrows.errors import ConfigError, InputError, ModelError, reason
from narrows.model import hub
from narrows.retrieve.audio import RATE, Wave
from narrows.retrieve.clips import LONGEST_S
from narrows.retrieve.transcribe import RECOGNISER, crew

STATE_SECONDS = 0.02
CODE_LIMIT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


class SpeechEncoder:
    """A Whisper encoder.

    Args:
        model: a ``ctranslate2.models.Whisper``.
        name: what it is known by.
        workers: clips that are encoded at the same time.
    """

    def __init__(self, model: Any, name: str, workers: int = 1) -> None:
        from faster_whisper.feature_extractor import FeatureExtractor

        self.model, self.name, self.workers = model, name, workers
        self.features = FeatureExtractor(feature_size=model.n_mels, sampling_rate=RATE)

    @classmethod
    def load(cls, name: str = RECOGNISER) -> SpeechEncoder:
        """Load an encoder by name (see ``narrows.model.hub.resolve``). Raises ModelError, and
        ConfigError where the packages for it are not installed."""
        try:
            import ctranslate2
        except ImportError:
            raise ConfigError("reading speech needs: pip install 'narrows[listen]'") from None
        folder = hub.resolve(name)
        try:
            with crew() as (workers, threads):
                model = ctranslate2.models.Whisper(
                    str(folder),
                    device="cpu",
                    compute_type="int8",
                    inter_threads=workers,
                    intra_threads=threads,
                )
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"cannot read a Whisper model from {folder}: {reason(error)}"
            ) from None
        encoder = cls(model, name, workers)
        with _little_code_kept():
            encoder.encode([np.zeros(RATE // 10, np.float32)])
        return encoder

    def encode(self, waves: Sequence[Wave]) -> list[Tensor]:
        """States float32 ``[T, size]`` of each clip, encoded by itself. Raises InputError if one
        is empty, longer than the encoder knows positions for, or not finite."""
        # NumPy's threads keep a processor busy for a while after its products, which the encoder
        # then lacks: all features are made before it begins.
        features = [self._features(wave) for wave in waves]
        with ThreadPoolExecutor(self.workers) as pool:
            return [*pool.map(self._encoded, features)]

    def _features(self, wave: Wave) -> NDArray[np.float32]:
        if not 0 < len(wave) <= LONGEST_S * RATE:
            raise InputError(
                f"a clip of {len(wave) / RATE:.2f} s cannot be encoded; give more than none and "
                f"at most {LONGEST_S:g} s"
            )
        if not np.isfinite(wave).all():
            raise InputError("a clip holds samples that are not finite numbers; it is damaged")
        mel = self.features(wave, padding=RATE // 100)[:, : round(LONGEST_S / 0.01)]
        return np.ascontiguousarray(mel[None], dtype=np.float32)

    def _encoded(self, mel: NDArray[np.float32]) -> Tensor:
        from ctranslate2 import StorageView

        states = self.model.encode(StorageView.from_array(mel), to_cpu=True)
        return torch.from_numpy(np.array(states)[0])


@contextmanager
def _little_code_kept() -> Iterator[None]:
    """Where a process first encodes: CTranslate2's oneDNN then reads how much code it may keep, and
    would keep some for each of a thousand lengths of clip."""
    before = os.environ.get(CODE_LIMIT)
    os.environ.setdefault(CODE_LIMIT, "8")
    try:
        yield
    finally:
        if before is None:
            del os.environ[CODE_LIMIT]

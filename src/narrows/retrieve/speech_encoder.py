"""What a speech encoder makes of a clip: states, one every 20 ms.

Whisper's encoder, run by CTranslate2 in 8 bits, or one of transformers. A clip is encoded alone and
as long as it is, where Whisper itself fills every clip up to 30 seconds: short clips cost what they
are long, and a recogniser is trained on states of the same kind. The last sample is followed by
10 ms of silence.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

from narrows.errors import ConfigError, InputError, ModelError, reason
from narrows.model import ctranslate2, hub
from narrows.model.pretrained import from_folder, weights_from_folder
from narrows.retrieve.audio import RATE, Wave
from narrows.retrieve.clips import LONGEST_S
from narrows.retrieve.transcribe import RECOGNISER, crew

STATE_SECONDS = 0.02
CODE_LIMIT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


class SpeechEncoder(ABC):
    """An encoder, called ``name``, with ``state_size`` numbers a state and a state every
    ``state_seconds``."""

    name: str
    state_size: int
    state_seconds: float

    @staticmethod
    def load(name: str = RECOGNISER, *, device: str | None = None) -> SpeechEncoder:
        """Load an encoder by name or folder (see ``narrows.model.hub.resolve``): a Whisper in
        CTranslate2's form, run on the CPU, or a Whisper or wav2vec2-style model (wav2vec2, HuBERT,
        WavLM, ...) of transformers, on ``device``, None taking CUDA where there is one. Raises
        ModelError, and ConfigError where the packages for it are not installed."""
        folder = hub.resolve(name)
        if ctranslate2.is_model(folder / ctranslate2.WEIGHTS):
            return FastWhisper.of(folder, name)
        return TransformersEncoder.of(folder, name, device)

    def encode(self, waves: Sequence[Wave]) -> list[Tensor]:
        """States float32 ``[T, state_size]`` of each clip, encoded by itself. Raises InputError if
        one is empty, longer than LONGEST_S, or not finite."""
        for wave in waves:
            if not 0 < len(wave) <= LONGEST_S * RATE:
                raise InputError(
                    f"a clip of {len(wave) / RATE:.2f} s cannot be encoded; give more than none "
                    f"and at most {LONGEST_S:g} s"
                )
            if not np.isfinite(wave).all():
                raise InputError("a clip holds samples that are not finite numbers; it is damaged")
        return self._states(waves)

    @abstractmethod
    def _states(self, waves: Sequence[Wave]) -> list[Tensor]:
        """``encode``, of clips that can be."""


class FastWhisper(SpeechEncoder):
    """Whisper's encoder in CTranslate2.

    Args:
        model: a ``ctranslate2.models.Whisper``.
        name: what it is known by.
        workers: clips that are encoded at the same time.
    """

    def __init__(self, model: Any, name: str, workers: int = 1) -> None:
        from faster_whisper.feature_extractor import FeatureExtractor

        self.model, self.name, self.workers = model, name, workers
        self.features = FeatureExtractor(feature_size=model.n_mels, sampling_rate=RATE)
        with _little_code_kept():
            (states,) = self.encode([np.zeros(RATE // 10, np.float32)])
        self.state_size, self.state_seconds = states.shape[1], STATE_SECONDS

    @classmethod
    def of(cls, folder: Path, name: str) -> FastWhisper:
        """The one in ``folder``. Raises as ``load``."""
        try:
            from ctranslate2.models import Whisper
        except ImportError:
            raise ConfigError("reading speech needs: pip install 'narrows[listen]'") from None
        try:
            with crew() as (workers, threads):
                model = Whisper(
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
        return cls(model, name, workers)

    def _states(self, waves: Sequence[Wave]) -> list[Tensor]:
        # NumPy's threads keep a processor busy for a while after its products, which the encoder
        # then lacks: all features are made before it begins.
        features = [self._features(wave) for wave in waves]
        with ThreadPoolExecutor(self.workers) as pool:
            made = pool.map(self._encoded, features)
            # Copied here: what a thread allocates is given back late, and memory would grow.
            return [torch.from_numpy(np.array(one)[0]) for one in made]

    def _features(self, wave: Wave) -> NDArray[np.float32]:
        mel = self.features(wave, padding=RATE // 100)[:, : round(LONGEST_S / 0.01)]
        return np.ascontiguousarray(mel[None], dtype=np.float32)

    def _encoded(self, mel: NDArray[np.float32]) -> Any:
        from ctranslate2 import StorageView

        return self.model.encode(StorageView.from_array(mel), to_cpu=True)


class TransformersEncoder(SpeechEncoder):
    """A Whisper or wav2vec2-style encoder of transformers, in float32. Whisper's there reads 30 s
    at once, so a clip is filled up, and the states behind it are cut off.

    Args:
        model: a ``WhisperModel``, or one that takes ``input_values`` and has ``conv_stride``.
        features: its feature extractor.
        name: what it is known by.

    Raises ModelError for another kind of model.
    """

    def __init__(self, model: Any, features: Any, name: str) -> None:
        config = model.config
        self.filled = config.model_type == "whisper"
        if not self.filled and not hasattr(config, "conv_stride"):
            raise ModelError(
                f"{name} is of the kind {config.model_type}: give a Whisper or a wav2vec2-style "
                "speech encoder"
            )
        if features.sampling_rate != RATE:
            raise ModelError(f"{name} hears {features.sampling_rate} samples a second, not {RATE}")
        inner = model.get_encoder() if self.filled else model
        self.model = inner.eval().requires_grad_(False)
        self.features, self.name = features, name
        self.state_size = config.hidden_size
        self.least, stride = 1, 1
        if self.filled:
            stride = 2 * features.hop_length
        else:  # samples that make one state
            for kernel, own in zip(config.conv_kernel, config.conv_stride, strict=True):
                self.least, stride = self.least + (kernel - 1) * stride, stride * own
        self.state_seconds = stride / RATE

    @classmethod
    def of(cls, folder: Path, name: str, device: str | None) -> TransformersEncoder:
        """The one in ``folder``. Raises as ``load``."""
        model = weights_from_folder(AutoModel, folder, more=True)
        features = from_folder(AutoFeatureExtractor, folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), features, name)

    @torch.inference_mode()
    def _states(self, waves: Sequence[Wave]) -> list[Tensor]:
        made = []
        for wave in waves:
            enough = np.pad(wave, (0, max(0, self.least - len(wave))))
            given = self.features(enough, sampling_rate=RATE, return_tensors="pt")
            (states,) = self.model(**given.to(self.model.device)).last_hidden_state.float().cpu()
            if self.filled:
                states = states[: math.ceil(len(wave) / RATE / self.state_seconds)]
            made.append(states)
        return made


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

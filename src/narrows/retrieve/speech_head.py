"""What stands between a speech encoder and a text encoder, and listens: what all such heads share.

The encoders are frozen; a head is a small module, trained for the two of them, in a folder of its
own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from narrows.errors import ModelError
from narrows.model import fetch, hub
from narrows.retrieve.audio import RATE, Wave
from narrows.retrieve.clips import LEAST_S
from narrows.retrieve.hearing import Heard
from narrows.retrieve.rank import Embedder, checked_question
from narrows.retrieve.speech_encoder import SpeechEncoder

STRIDE = 2
"""States of the speech encoder a frame."""
BATCH = 4
"""Clips heard at once. On a CPU more are slower, since they do not fit its caches."""
WHOLE = 64
"""Batches are filled up to a multiple of so many states, and so have few shapes: torch keeps code
for each, and memory would grow with every new one."""


class Between(Protocol):
    """The encoders that a head was trained for, by name."""

    @property
    def speech_encoder(self) -> str:
        """See ``SpeechEncoder.load``."""

    @property
    def text_encoder(self) -> str:
        """See ``Embedder.load``."""


class HeadBackend(ABC):
    """Hears through a head. See ``hearing.Backend``.

    Args:
        folder: the head's, loaded at first use with the encoders its config names.

    Raises ModelError or ConfigError, when it is used.
    """

    name: ClassVar[str]
    weights: ClassVar[str]
    """The file of the head in its folder."""
    verbatim = False

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    @property
    @abstractmethod
    def config(self) -> Between:
        """The head's."""

    @abstractmethod
    def hear(self, waves: Sequence[Wave]) -> list[Heard]:
        """See ``hearing.Backend``."""

    @cached_property
    def speech(self) -> SpeechEncoder:
        """The speech encoder."""
        return SpeechEncoder.load(self.config.speech_encoder)

    @cached_property
    def embedder(self) -> Embedder:
        """The text encoder."""
        return Embedder.load(self.config.text_encoder)

    @cached_property
    def hears(self) -> str:
        """See ``hearing.Backend``."""
        encoder = self.config.speech_encoder
        try:
            own = fetch.sha256(self._folder / self.weights)[:16]
        except OSError as error:
            raise ModelError(
                f"cannot read {self._folder / self.weights} ({error.strerror}): give the folder of "
                "a trained one"
            ) from None
        return f"{encoder} {hub.revision(hub.resolve(encoder))} {self.name} {own}"

    @cached_property
    def encodes(self) -> str:
        """See ``hearing.Backend``."""
        encoder = self.config.text_encoder
        return f"{encoder} {hub.revision(hub.resolve(encoder))}"

    def states(self, waves: Sequence[Wave]) -> dict[int, Tensor]:
        """States ``[T, size]`` of the clips in which something may be said, those not shorter than
        LEAST_S, by their numbers."""
        heard = [i for i, wave in enumerate(waves) if len(wave) >= LEAST_S * RATE]
        return dict(zip(heard, self.speech.encode([waves[i] for i in heard]), strict=True))

    def embed(self, question: str) -> NDArray[np.float32]:
        """See ``hearing.Backend``."""
        vector: NDArray[np.float32] = self.embedder.embed([checked_question(question)])[0]
        return vector

    def pieces(self, question: str) -> list[int]:
        """See ``hearing.Backend``."""
        return self.embedder.pieces(question)


def framed(
    states: Tensor, mask: Tensor, narrow: nn.Conv1d, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """States ``[B, T, state_size]``, of which ``mask`` bool ``[B, T]`` are not padding, as frames
    ``[B, ceil(T / STRIDE), width]``, 0 in padding, and their mask. What stands in padding is not
    read. ``narrow`` has the stride."""
    states = states.masked_fill(~mask[:, :, None], 0.0)
    frames = narrow(states.transpose(1, 2)).relu().transpose(1, 2)
    real = mask[:, ::STRIDE]
    return norm(frames).masked_fill(~real[:, :, None], 0.0), real


def padded(
    states: Sequence[Tensor], device: torch.device | str | None = None, whole: int = 1
) -> tuple[Tensor, Tensor]:
    """Clips of states ``[T, size]`` as one batch float32 ``[B, T, size]``, and which of it is not
    padding, bool ``[B, T]``; ``T`` is the least multiple of ``whole`` that holds them."""
    batch = nn.utils.rnn.pad_sequence([s.float() for s in states], batch_first=True).to(device)
    batch = filled_up(batch, whole)
    lengths = torch.tensor([len(s) for s in states], device=device)
    return batch, torch.arange(batch.shape[1], device=device) < lengths[:, None]


def filled_up(x: Tensor, whole: int) -> Tensor:
    """``[..., N, size]`` with zeros behind, up to a multiple of ``whole``."""
    return pad(x, (0, 0, 0, -x.shape[-2] % whole))


def by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of all clips, up to BATCH of like length at a time: little of them is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), BATCH):
        yield order[first : first + BATCH]

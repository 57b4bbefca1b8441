"""A dual encoder: a clip of speech read straight into the space of a text encoder, without words.

The conventional way that CLSR (``narrows.retrieve.clsr``) is an answer to: the same two frozen
encoders, and between them a head of like size that makes one vector of a clip (after Hu et al.,
arXiv 2511.09282, Table 4; in form as CLAP, Elizalde et al., arXiv 2206.04769). It writes no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, normalize

from narrows.config import Settings
from narrows.errors import ConfigError
from narrows.model.saved import load_config, load_module, save_module
from narrows.retrieve.audio import Wave
from narrows.retrieve.clsr import Pieces
from narrows.retrieve.hearing import Heard
from narrows.retrieve.rank import ENCODER
from narrows.retrieve.speech_head import STRIDE, WHOLE, HeadBackend, by_length, framed, padded
from narrows.retrieve.transcribe import RECOGNISER

WEIGHTS, NAME = "dual.safetensors", "dual encoder"


class DualConfig(Settings):
    """Sizes of a dual encoder's head and what it belongs to.

    ``state_size`` is the speech encoder's, ``text_width`` that of the text encoder's vectors;
    ``vocabulary`` tells text encoders apart, see ``Pieces``.
    """

    vocabulary: str
    text_width: Annotated[int, Field(ge=1)]
    state_size: Annotated[int, Field(ge=1)] = 512
    width: Annotated[int, Field(ge=1)] = 384
    blocks: Annotated[int, Field(ge=1)] = 3
    heads: Annotated[int, Field(ge=1)] = 6
    inner: Annotated[int, Field(ge=1)] = 1536
    kernel: Annotated[int, Field(ge=1)] = 11
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    speech_encoder: str = RECOGNISER
    text_encoder: str = ENCODER

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")
        if self.kernel % 2 == 0:
            raise ValueError("kernel must be odd")
        return self


class Block(nn.Module):
    """A transformer block, norms first. Dropout is of what is added only, as in CLSR's blocks:
    dropped attention weights would have to be written out."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        size, self.dropout = config.width, config.dropout
        self.first_norm, self.second_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attend = nn.MultiheadAttention(size, config.heads, batch_first=True)
        self.up = nn.Linear(size, config.inner)
        self.down = nn.Linear(config.inner, size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """``x`` ``[B, T, width]``, of which ``real`` bool ``[B, T]`` are not padding."""
        y = self.first_norm(x)
        mixed, _ = self.attend(y, y, y, key_padding_mask=~real, need_weights=False)
        x = x + dropout(mixed, self.dropout, self.training)
        y = self.down(gelu(self.up(self.second_norm(x))))
        return x + dropout(y, self.dropout, self.training)


class DualEncoder(nn.Module):
    """From states of a speech encoder to vectors of a text encoder.

    Frames of two states as CLSR's, to each of which a depthwise convolution adds what is around it,
    transformer blocks, then a mean of the frames, which every head weighs for its own share of the
    channels, and a projection.

    Args:
        config: see DualConfig.
        pieces: of the text encoder.

    Raises ConfigError if the two do not belong together.
    """

    def __init__(self, config: DualConfig, pieces: Pieces) -> None:
        super().__init__()
        if config.vocabulary != pieces.digest or config.text_width != pieces.table.shape[1]:
            raise ConfigError(
                "this dual encoder was trained for another text encoder; take the one of its "
                f"config, {config.text_encoder}"
            )
        self.config = config
        size = config.width
        self.narrow = nn.Conv1d(config.state_size, size, 3, stride=STRIDE, padding=1)
        self.frame_norm = nn.LayerNorm(size)
        self.neighbours = nn.Conv1d(
            size, size, config.kernel, padding=config.kernel // 2, groups=size
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.out_norm = nn.LayerNorm(size)
        self.weigh = nn.Linear(size, config.heads, bias=False)
        self.project = nn.Linear(size, config.text_width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors float32 ``[B, text_width]`` of clips of states ``[B, T, state_size]``, of
        which ``mask`` bool ``[B, T]`` are not padding. What stands in padding is not read."""
        x, real = framed(states, mask, self.narrow, self.frame_norm)
        x = x + gelu(self.neighbours(x.transpose(1, 2))).transpose(1, 2)
        for block in self.blocks:
            x = block(x, real)
        x = self.out_norm(x)
        shares = self.weigh(x).float().masked_fill(~real[:, :, None], float("-inf")).softmax(1)
        parts = x.float().unflatten(-1, (self.config.heads, -1))
        mean = (shares[..., None] * parts).sum(1).flatten(1)
        return normalize(self.project(mean).float(), dim=-1)

    @torch.inference_mode()
    def encode(self, states: Sequence[Tensor]) -> NDArray[np.float32]:
        """Unit vectors ``[len(states), text_width]`` of clips of states ``[T, state_size]``. A
        clip's vector does not depend on its neighbours beyond rounding."""
        assert not self.training
        vectors = np.zeros((len(states), self.config.text_width), np.float32)
        for chosen in by_length([*map(len, states)]):
            batch = padded([states[i] for i in chosen], self.project.weight.device, WHOLE)
            vectors[chosen] = self(*batch).cpu().numpy()
        return vectors

    def save(self, folder: Path) -> None:
        """Write the weights as bfloat16 and the config, each beside and then renamed."""
        save_module(self, self.config, folder, WEIGHTS)

    @classmethod
    def load(cls, folder: Path, pieces: Pieces) -> DualEncoder:
        """What ``save`` wrote, in float32, for the text encoder of these ``pieces``. Raises
        ModelError if it is not there, not whole, not of its config or for another text encoder."""
        module = load_module(lambda config: cls(config, pieces), DualConfig, folder, WEIGHTS, NAME)
        return module.eval()


class DualBackend(HeadBackend):
    """Searches by what a dual encoder makes of clips. See ``HeadBackend``. The text of a clip is
    empty, so it is found by its vector alone."""

    name, weights = "dual", WEIGHTS

    @cached_property
    def config(self) -> DualConfig:
        """The dual encoder's."""
        return load_config(self._folder, DualConfig, NAME)

    @cached_property
    def encoder(self) -> DualEncoder:
        """What stands between the two encoders."""
        module = DualEncoder.load(self._folder, Pieces.of(self.embedder))
        return module.to(self.embedder.model.device)

    def hear(self, waves: Sequence[Wave]) -> list[Heard]:
        """See ``hearing.Backend``. A clip shorter than LEAST_S has the vector 0."""
        states = self.states(waves)
        vectors = np.zeros((len(waves), self.config.text_width), np.float32)
        vectors[[*states]] = self.encoder.encode([*states.values()])
        return [Heard("", np.zeros(0, np.int32), vector) for vector in vectors]

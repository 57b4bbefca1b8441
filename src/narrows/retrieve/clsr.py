"""CLSR: a clip of speech read straight into the vocabulary of a text encoder.

After Hu et al., "End-to-end Contrastive Language-Speech Pretraining Model For Long-form Spoken
Question Answering" (arXiv 2511.09282), section numbers as in our design sheet. A small recogniser
on the states of a frozen speech encoder writes all word pieces of a clip at once: integrate-and-
fire (``narrows.retrieve.cif``) says how many there are and where, a decoder in both directions
which ones. What the text encoder makes of them is the clip's embedding, and finds it by questions
in text. The transcript comes with it, and any other encoder of the same vocabulary can embed it
again.

This is the small preset of the sheet (section 9): the speech encoder is Whisper's, the output is
tied to the embedding table of the text encoder, of whose width the recogniser is.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear, scaled_dot_product_attention

from narrows.config import Settings
from narrows.errors import ConfigError
from narrows.model.saved import load_module, save_module
from narrows.retrieve.cif import Fired, Tail, fire, spans
from narrows.retrieve.rank import ENCODER, Embedder
from narrows.retrieve.speech_encoder import STATE_SECONDS
from narrows.retrieve.speech_head import (
    STRIDE,
    WHOLE,
    by_length,
    filled_up,
    framed,
    padded,
)
from narrows.retrieve.spelling import spelt
from narrows.retrieve.transcribe import RECOGNISER

WEIGHTS, NAME = "clsr.safetensors", "recogniser"
NEAR = 5
"""States that a convolution of ``ClsrConfig.near`` looks at."""
GUESSES = 16
"""Pieces that are told of each token, the written one first."""
WHOLE_PLACES = 16
"""As WHOLE, of the places of a draft."""
EDGE = 0.1
"""Of a token's weight, what does not count for when it is said; see ``spans``."""
USUAL_WEIGHT = 0.18
"""Of a frame before training: word pieces a frame of 40 ms in ordinary speech."""


class ClsrConfig(Settings):
    """Sizes of a recogniser and what it belongs to.

    ``state_size`` and ``state_seconds`` are the speech encoder's, ``width`` and ``vocab_size`` the
    text encoder's; ``vocabulary`` is the digest of its word pieces, see ``Pieces``. Extensions:
    ``near`` convolutions over neighbouring states come before frames are made; ``spelling`` writes
    pieces also by how they are spelt, see ``narrows.retrieve.spelling``.
    """

    vocab_size: Annotated[int, Field(ge=GUESSES)]
    vocabulary: str
    state_size: Annotated[int, Field(ge=1)] = 512
    state_seconds: Annotated[float, Field(gt=0.0)] = STATE_SECONDS
    width: Annotated[int, Field(ge=1)] = 384
    blocks: Annotated[int, Field(ge=1)] = 3
    heads: Annotated[int, Field(ge=1)] = 6
    inner: Annotated[int, Field(ge=1)] = 1536
    kernel: Annotated[int, Field(ge=1)] = 11
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    tail: Tail = "zero_frame"
    near: Annotated[int, Field(ge=0)] = 0
    spelling: bool = False
    speech_encoder: str = RECOGNISER
    text_encoder: str = ENCODER

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")
        if self.kernel % 2 == 0:
            raise ValueError("kernel must be odd")
        return self


@dataclass(frozen=True, slots=True)
class Pieces:
    """The word pieces of a text encoder: ``table`` float32 ``[vocab, width]`` embeds them,
    ``special`` bool ``[vocab]`` marks those that are never spoken (``[PAD]``, ``[unused1]``, ...),
    ``names`` says what each is, ``digest`` tells vocabularies apart, id for id, and tables: a
    recogniser writes by the one it was trained with, though what it wrote can be embedded by any
    encoder of the same pieces."""

    table: Tensor
    special: Tensor
    names: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, encoder: Embedder) -> Pieces:
        """The encoder's own."""
        ids = encoder.tokenizer.get_vocab()
        named = sorted(ids, key=lambda piece: ids[piece])
        at = {place: piece for piece, place in ids.items()}
        table = encoder.model.embeddings.word_embeddings.weight.detach().float()
        digest = hashlib.sha256("\n".join(f"{ids[p]} {p}" for p in named).encode())
        digest.update(table.cpu().numpy().tobytes())
        special = torch.ones(len(table), dtype=torch.bool)
        special[[ids[p] for p in named if not re.fullmatch(r"\[.+\]", p)]] = False
        names = tuple(at.get(i, "") for i in range(len(table)))
        return cls(table, special.to(table.device), names, digest.hexdigest()[:16])


class Memory(NamedTuple):
    """A batch of clips as the decoder looks at it: ``keys`` and ``values`` ``[B, heads, T, dim]``
    and which frames are not padding, ``mask`` bool ``[B, T]``."""

    keys: Tensor
    values: Tensor
    mask: Tensor


class Draft(NamedTuple):
    """What a recogniser makes of a batch of clips, place by place: ``embeds`` ``[B, N, width]``,
    what fired, ``vectors`` of the same shape, what the decoder made of them, 0 where there is no
    place, and ``counts`` int64 ``[B]``, places of each clip."""

    embeds: Tensor
    vectors: Tensor
    counts: Tensor

    @property
    def places(self) -> Tensor:
        """Bool ``[B, N]``."""
        return torch.arange(self.embeds.shape[1], device=self.counts.device) < self.counts[:, None]


Revise = Callable[[Tensor, Tensor, Draft, Tensor], Tensor]
"""Better scores ``[R, vocab]`` for all places of a draft, clip after clip: from the states and mask
it was made from, the draft, and the recogniser's scores."""


class FeedForward(nn.Module):
    """Two layers with a norm between them, without a residual (3.1)."""

    def __init__(self, config: ClsrConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.inner)
        self.norm = nn.LayerNorm(config.inner)
        self.down = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> ``[..., width]``."""
        return self.down(self.norm(self.up(x).relu()))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A decoder block of SAN-M (3.1): feed-forward, a memory of neighbouring tokens in place of
    self-attention, then attention to the clip."""

    def __init__(self, config: ClsrConfig) -> None:
        super().__init__()
        size = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.first_norm, self.second_norm, self.third_norm = (nn.LayerNorm(size) for _ in range(3))
        self.feed = FeedForward(config)
        self.neighbours = nn.Conv1d(
            size, size, config.kernel, padding=config.kernel // 2, groups=size, bias=False
        )
        self.query = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, real: Tensor, memory: Memory) -> Tensor:
        """``x`` ``[B, N, width]``, of which ``real`` bool ``[B, N]`` are tokens."""
        y = self.second_norm(self.feed(self.first_norm(x))).masked_fill(~real[:, :, None], 0.0)
        y = y + self.neighbours(y.transpose(1, 2)).transpose(1, 2)
        x = x + dropout(y, self.dropout, self.training)
        queries = self.query(self.third_norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        found = scaled_dot_product_attention(
            queries, memory.keys, memory.values, attn_mask=memory.mask[:, None, None]
        )
        mixed = self.out(found.transpose(1, 2).flatten(2))
        return x + dropout(mixed, self.dropout, self.training)


class Recogniser(nn.Module):
    """From states of a speech encoder to word pieces.

    Args:
        config: see ClsrConfig.
        pieces: of the text encoder; its table is the output layer (and no parameter of this).

    Raises ConfigError if the two do not belong together.
    """

    table: Tensor
    special: Tensor
    spelt: Tensor

    def __init__(self, config: ClsrConfig, pieces: Pieces) -> None:
        super().__init__()
        if config.vocabulary != pieces.digest or pieces.table.shape != (
            config.vocab_size,
            config.width,
        ):
            raise ConfigError(
                "this recogniser writes the word pieces of another text encoder; take the one of "
                f"its config, {config.text_encoder}"
            )
        self.config = config
        self.register_buffer("table", pieces.table, persistent=False)
        self.register_buffer("special", pieces.special, persistent=False)
        size = config.width
        sizes = [config.state_size, *[size] * config.near]
        self.near = nn.ModuleList(
            nn.Conv1d(one, size, NEAR, padding=NEAR // 2) for one in sizes[: config.near]
        )
        self.narrow = nn.Conv1d(sizes[-1], size, 3, stride=STRIDE, padding=1)
        self.frame_norm = nn.LayerNorm(size)
        self.weigh_near = nn.Conv1d(size, size, 3, padding=1)
        self.weigh = nn.Linear(size, 1)
        nn.init.constant_(self.weigh.bias, math.log(USUAL_WEIGHT / (1 - USUAL_WEIGHT)))
        self.memory = nn.Linear(size, 2 * size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.last_norm = nn.LayerNorm(size)
        self.last_feed = FeedForward(config)
        self.out_norm = nn.LayerNorm(size)
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        if config.spelling:
            runs = spelt(pieces.names).to(pieces.table.device)
            self.register_buffer("spelt", runs, persistent=False)
            self.runs = nn.Parameter(torch.zeros(runs.shape[1], size))
        self._written: Tensor | None = None

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; what was worked out of weights that may now change is let go."""
        self._written = None
        return super().train(mode)

    def refined(self, states: Tensor, mask: Tensor) -> Tensor:
        """States ``[B, T, state_size]`` behind the ``near`` convolutions ``[B, T, width]``; as they
        were where there are none. What stands in padding is not read."""
        for layer in self.near:
            states = states.masked_fill(~mask[:, :, None], 0.0)
            states = gelu(layer(states.transpose(1, 2))).transpose(1, 2)
        return states

    def frames(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Frames of states and which are not padding, see ``framed``."""
        return framed(self.refined(states, mask), mask, self.narrow, self.frame_norm)

    def fired(
        self, frames: Tensor, real: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Fired]:
        """One embedding a token ``[B, N, width]``, and how they came about (3.1, 3.2). Weights and
        their sums are float32 at least, whatever the products are made in."""
        near = self.weigh_near(frames.transpose(1, 2)).relu().transpose(1, 2)
        weights = self.weigh(near)[:, :, 0].float().sigmoid()
        fired = fire(weights, real, targets, tail=self.config.tail)
        return fired.shares @ frames.float(), fired

    def remember(self, frames: Tensor, real: Tensor) -> Memory:
        """Frames as all blocks look at them, projected once (section 9)."""
        split = self.memory(frames).unflatten(-1, (2, self.config.heads, -1))
        keys, values = split.permute(2, 0, 3, 1, 4)
        return Memory(keys, values, real)

    def decode(self, embeds: Tensor, counts: Tensor, memory: Memory) -> Tensor:
        """Vectors ``[R, width]`` of the real tokens, item after item, ready for ``scores``.

        ``embeds`` ``[B, N, width]`` holds ``counts[b]`` tokens of item ``b``; the rest is not read.
        """
        real = torch.arange(embeds.shape[1], device=embeds.device) < counts[:, None]
        x = embeds.masked_fill(~real[:, :, None], 0.0)
        for block in self.blocks:
            x = block(x, real, memory)
        return self.out_norm(self.last_feed(self.last_norm(x[real])))  # type: ignore[no-any-return]

    def scores(self, x: Tensor) -> Tensor:
        """Float32 scores of all pieces, special ones too, ``[R, vocab]``."""
        if not self.config.spelling:  # the table is a constant: no gradient of its size is made
            return linear(x * self.scale, self.table, self.bias).float()
        return linear(x, self._spelling(), self.bias).float()

    def _spelling(self) -> Tensor:
        """The output layer ``[vocab, width]`` with what spelling adds to the scaled table; worked
        out once where weights do not change."""
        if self._written is not None:
            return self._written
        with torch.autocast(self.table.device.type, enabled=False):  # has no sparse products
            written = self.table * self.scale + self.spelt @ self.runs
        if not self.training:
            self._written = written
        return written

    def draft(
        self, states: Tensor, mask: Tensor, targets: Tensor | None = None
    ) -> tuple[Draft, Fired]:
        """What is made of a batch of states ``[B, T, state_size]``, and how it fired; ``targets``
        as ``fire`` has them."""
        frames, real = self.frames(states, mask)
        embeds, fired = self.fired(frames, real, targets)
        embeds = filled_up(embeds, WHOLE_PLACES)
        draft = Draft(embeds, torch.zeros_like(embeds), fired.counts)
        if embeds.shape[1]:  # else nothing fired
            found = self.decode(embeds, fired.counts, self.remember(frames, real))
            draft.vectors[draft.places] = found.to(embeds.dtype)
        return draft, fired

    @torch.inference_mode()
    def recognise(self, states: Sequence[Tensor], revise: Revise | None = None) -> list[Written]:
        """What is said in clips of states ``[T, state_size]``, all word pieces of a clip at once,
        as many as its own weights fire; ``revise`` has the last word on which. A clip's result
        does not depend on its neighbours beyond rounding."""
        assert not self.training
        found: dict[int, Written] = {}
        for chosen in by_length([*map(len, states)]):
            written = self._recognise([states[i] for i in chosen], revise)
            found |= zip(chosen, written, strict=True)
        return [found[i] for i in range(len(states))]

    def _recognise(self, states: list[Tensor], revise: Revise | None) -> list[Written]:
        batch, mask = padded(states, self.table.device, WHOLE)
        draft, fired = self.draft(batch, mask)
        counts: list[int] = fired.counts.tolist()
        if not any(counts):
            return [SILENT for _ in states]
        scores = self.scores(draft.vectors[draft.places])
        if revise is not None:
            scores = revise(batch, mask, draft, scores)
        best = scores.masked_fill(self.special, -math.inf).softmax(1).topk(GUESSES)
        seconds = spans(fired.shares, EDGE).double() * STRIDE * self.config.state_seconds
        heard = []
        parts = (torch.split(part, counts) for part in (best.indices, best.values))
        for own, chances, spanned in zip(*parts, seconds.tolist(), strict=True):
            times = [(start, stop) for start, stop in spanned[: len(own)]]
            heard.append(Written(own.tolist(), times, chances.tolist()))
        return heard

    def save(self, folder: Path) -> None:
        """Write the weights as bfloat16 and the config, each beside and then renamed."""
        save_module(self, self.config, folder, WEIGHTS)

    @classmethod
    def load(cls, folder: Path, pieces: Pieces) -> Recogniser:
        """What ``save`` wrote, in float32, for the text encoder of these ``pieces``. Raises
        ModelError if it is not there, not whole, not of its config or of another vocabulary."""
        module = load_module(lambda config: cls(config, pieces), ClsrConfig, folder, WEIGHTS, NAME)
        return module.eval()


@dataclass(frozen=True, slots=True)
class Written:
    """What was recognised in a clip, token by token: ``guesses`` of it, GUESSES ids of word pieces,
    the likeliest first, its ``times``, first and last second within the clip, and the
    probabilities, ``chances``, of the guesses. All empty where nothing was said."""

    guesses: list[list[int]]
    times: list[tuple[float, float]]
    chances: list[list[float]]

    @property
    def ids(self) -> list[int]:
        """The word pieces that are written."""
        return [own[0] for own in self.guesses]


SILENT = Written([], [], [])


def in_words(ids: Sequence[int], text: Embedder) -> str:
    """Word pieces of ``text`` as words, in lower case and without punctuation."""
    pieces = text.tokenizer.convert_ids_to_tokens(list(ids))
    return " ".join(pieces).replace(" ##", "")


def embedded(clips: Sequence[Sequence[int]], text: Embedder) -> NDArray[np.float32]:
    """Unit vectors ``[len(clips), width]`` of word pieces: what ``text`` makes of the same words. A
    clip in which nothing was said has the vector 0; what the encoder cannot read of a long one has
    no part in its vector."""
    vectors = text.embed_pieces([ids[: text.max_tokens - 2] for ids in clips])
    vectors[[not ids for ids in clips]] = 0.0
    return vectors

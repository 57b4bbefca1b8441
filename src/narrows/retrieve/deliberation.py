"""A second pass: Whisper's decoder reads again what a recogniser wrote, all pieces at once.

An extension of ours to CLSR. Whisper's decoder writes token after token, each from those before it
and from what it finds in the clip. Here it is given a whole draft at once: every place holds the
piece drafted before it, what integrate-and-fire heard there, and what the recogniser's own decoder
made of that place and its neighbours. Its scores are added to the recogniser's. Passes of that kind
are known as deliberation (Hu et al., arXiv 2003.07962). The decoder is the public one; what is
trained is a change of low rank to its layers, and how it is told and how it answers in the word
pieces of a text encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad, scaled_dot_product_attention

from narrows.config import Settings
from narrows.errors import ConfigError, ModelError
from narrows.model import ctranslate2, hub
from narrows.model.saved import load_config, load_module, save_module
from narrows.ops.native import wide_matmul_dtype
from narrows.retrieve.clsr import Draft, Pieces
from narrows.retrieve.spelling import spelt
from narrows.retrieve.transcribe import RECOGNISER

WEIGHTS, CONFIG, NAME = "deliberation.safetensors", "deliberation.json", "second pass"
PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
"""What stands before the first token that Whisper writes."""
BEHIND = 1.5
"""By how much, at first, a piece scores less for each token of Whisper's it has beyond one: all
that begin with the same one would score alike."""
SHARE = 0.4
"""Of the recogniser's scores that is added, at first."""
NEIGHBOURS = 3
"""Places of a draft that are told to each: the one before it, itself, the one behind it."""


class DeliberationConfig(Settings):
    """Sizes of a second pass and what it belongs to.

    ``recogniser`` tells the weights of the recogniser whose drafts it reads, ``vocab_size`` and
    ``width`` are that one's; ``state_size`` is Whisper's. ``rank`` is that of the changes to its
    layers.
    """

    recogniser: str
    vocab_size: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)] = 384
    state_size: Annotated[int, Field(ge=1)] = 512
    rank: Annotated[int, Field(ge=1)] = 32
    speech_encoder: str = RECOGNISER


@dataclass(frozen=True, slots=True)
class Decoder:
    """A Whisper decoder, and a text encoder's word pieces as its tokens.

    ``weights`` float32, by their names in CTranslate2's form; ``heads`` of attention; ``prompt``
    ``[4, size]`` embeds what comes first; ``begins`` and ``ends`` ``[vocab, size]`` embed the first
    and last token of each piece; ``tokens`` ``[vocab]`` counts them.
    """

    weights: dict[str, Tensor]
    heads: int
    prompt: Tensor
    begins: Tensor
    ends: Tensor
    tokens: Tensor

    @classmethod
    def load(cls, name: str, pieces: Pieces) -> Decoder:
        """That of the model called ``name`` (see ``narrows.model.hub.resolve``). Raises
        ModelError."""
        folder = hub.resolve(name)
        weights = _weights(folder / ctranslate2.WEIGHTS, "decoder/")
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise ModelError(f"cannot read the tokenizer in {folder}: {error}") from None
        return cls.of(weights, tokenizer, pieces)

    @classmethod
    def of(cls, weights: dict[str, Tensor], tokenizer: Tokenizer, pieces: Pieces) -> Decoder:
        """A decoder of these weights, whose tokens ``tokenizer`` numbers."""
        table = weights["embeddings/weight"]
        texts = [n.removeprefix("##") if n.startswith("##") else f" {n}" for n in pieces.names]
        split = [one.ids or [0] for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
        device = pieces.table.device
        weights = {key: value.to(device) for key, value in weights.items()}
        return cls(
            weights,
            int(weights["num_heads"]),
            table[[tokenizer.token_to_id(one) for one in PROMPT]].to(device),
            table[[ids[0] for ids in split]].to(device),
            table[[ids[-1] for ids in split]].to(device),
            torch.tensor([len(ids) for ids in split], device=device),
        )

    @property
    def layers(self) -> int:
        """How many it has."""
        return sum(key.endswith("/ffn/linear_0/weight") for key in self.weights)


def _weights(path: Path, begin: str) -> dict[str, Tensor]:
    """The variables of a CTranslate2 model whose names start with ``begin``, by the rest of their
    names, those of a floating-point type as float32. Raises ModelError for one that is damaged or
    stores weights as codes."""
    found = {}
    listed = ctranslate2.variables(path)
    with path.open("rb") as file:
        for name, one in listed.items():
            if not name.startswith(begin):
                continue
            dtype: torch.dtype = getattr(torch, one.dtype)
            if one.shape and not dtype.is_floating_point and name.endswith("weight"):
                raise ModelError(f"{path} stores weights as {one.dtype} codes; take float16")
            file.seek(one.offset)
            values = torch.frombuffer(bytearray(file.read(one.nbytes)), dtype=dtype)
            wide = values.float() if dtype.is_floating_point else values
            found[name.removeprefix(begin)] = wide.reshape(one.shape)
    return found


class Adapted(nn.Module):
    """A frozen linear layer and a trained change to it of low rank (LoRA, arXiv 2106.09685)."""

    base: Tensor
    bias: Tensor

    def __init__(self, base: Tensor, bias: Tensor, rank: int) -> None:
        super().__init__()
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.down = nn.Parameter(torch.randn(rank, base.shape[1]) / math.sqrt(base.shape[1]))
        self.up = nn.Parameter(torch.zeros(base.shape[0], rank))
        self._sum: Tensor | None = None

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; the sum that may now change is let go."""
        self._sum = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        if self.training:
            return linear(x, self.base, self.bias) + linear(linear(x, self.down), self.up)
        if self._sum is None:
            with torch.autocast(x.device.type, enabled=False):
                self._sum = self.base + self.up @ self.down
        return linear(x, self._sum, self.bias)


class Layer(nn.Module):
    """A layer of Whisper's decoder: attention to what was written, to the clip, feed-forward.

    Args:
        weights: the decoder's, of which ``begin`` begins the names of the layer's.
        rank: of its changes; attention to what was written, of which three parts are one layer,
            has twice that.
    """

    memory: Tensor
    memory_bias: Tensor

    def __init__(self, weights: dict[str, Tensor], begin: str, heads: int, rank: int) -> None:
        super().__init__()

        def of(part: str) -> tuple[Tensor, Tensor]:
            return weights[f"{begin}{part}/weight"], weights[f"{begin}{part}/bias"]

        self.heads = heads
        self.split = Adapted(*of("self_attention/linear_0"), 2 * rank)
        self.join = Adapted(*of("self_attention/linear_1"), rank)
        self.query = Adapted(*of("attention/linear_0"), rank)
        self.out = Adapted(*of("attention/linear_2"), rank)
        self.up = Adapted(*of("ffn/linear_0"), rank)
        self.down = Adapted(*of("ffn/linear_1"), rank)
        for name, value in zip(("memory", "memory_bias"), of("attention/linear_1"), strict=True):
            self.register_buffer(name, value, persistent=False)
        parts = ("self_attention", "attention", "ffn")
        self.norms = nn.ModuleList(_norm(weights, f"{begin}{part}/layer_norm") for part in parts)

    def forward(self, x: Tensor, seen: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """``x`` ``[B, N, size]``; ``seen`` bool ``[B, 1, N, N]`` says which places each sees,
        ``mask`` bool ``[B, 1, 1, T]`` which ``states`` ``[B, T, size]``."""
        q, k, v = self._heads(self.split(self.norms[0](x)), 3)
        found = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.join(found.transpose(1, 2).flatten(2))
        (q,) = self._heads(self.query(self.norms[1](x)), 1)
        k, v = self._heads(linear(states, self.memory, self.memory_bias), 2)
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[2](x))))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """``[B, N, parts * size]`` -> ``[parts, B, heads, N, dim]``."""
        split: Tensor = x.view(*x.shape[:2], parts, self.heads, -1)
        return split.permute(2, 0, 3, 1, 4)


class Deliberation(nn.Module):
    """The second pass.

    Args:
        config: see DeliberationConfig.
        pieces: of the text encoder.
        decoder: Whisper's.

    Raises ConfigError if they do not belong together.
    """

    table: Tensor
    special: Tensor
    spelt: Tensor
    begins: Tensor
    ends: Tensor
    prompt: Tensor
    positions: Tensor

    def __init__(self, config: DeliberationConfig, pieces: Pieces, decoder: Decoder) -> None:
        super().__init__()
        size = decoder.begins.shape[1]
        if pieces.table.shape != (config.vocab_size, config.width) or size != config.state_size:
            raise ConfigError(
                "this second pass belongs to another text encoder or another Whisper; take "
                f"{config.speech_encoder}, and the text encoder of its recogniser"
            )
        self.config = config
        positions = decoder.weights["position_encodings/encodings"]
        runs = spelt(pieces.names).to(pieces.table.device)
        frozen = {"table": pieces.table, "special": pieces.special, "spelt": runs}
        frozen |= {"begins": decoder.begins, "ends": decoder.ends}
        frozen |= {"prompt": decoder.prompt, "positions": positions}
        for name, value in frozen.items():
            self.register_buffer(name, value, persistent=False)
        self.layers = nn.ModuleList(
            Layer(decoder.weights, f"layer_{i}/", decoder.heads, config.rank)
            for i in range(decoder.layers)
        )
        self.norm = _norm(decoder.weights, "layer_norm")
        self.heard_norm = nn.LayerNorm(config.width)
        self.heard = nn.Linear(config.width, size)
        self.drafted = nn.Linear(NEIGHBOURS * config.width, size, bias=False)
        for added in (self.heard.weight, self.heard.bias, self.drafted.weight):
            nn.init.zeros_(added)
        self.share = nn.Parameter(torch.tensor(SHARE))
        self.bias = nn.Parameter(-BEHIND * (decoder.tokens - 1).float())
        self.runs = nn.Parameter(torch.zeros(runs.shape[1], size))
        self._written: Tensor | None = None

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; what was worked out of weights that may now change is let go."""
        self._written = None
        return super().train(mode)

    def forward(self, states: Tensor, mask: Tensor, draft: Draft, scores: Tensor) -> Tensor:
        """Float32 scores ``[R, vocab]`` of all pieces, special ones too, for the real places of a
        draft, clip after clip.

        Args:
            states: ``[B, T, state_size]``, what the draft was made from.
            mask: bool ``[B, T]``, which of them are not padding.
            scores: the recogniser's, ``[R, vocab]``.
        """
        embeds, vectors, counts = draft
        lead = len(self.prompt) - 1
        width = embeds.shape[1]
        place = torch.arange(lead + width, device=embeds.device)
        real = place < counts[:, None] + lead
        drafted = torch.zeros_like(draft.places, dtype=torch.long)
        drafted[draft.places] = scores.masked_fill(self.special, -math.inf).argmax(1)
        states = states.masked_fill(~mask[:, :, None], 0.0)
        start = self.prompt.expand(len(embeds), -1, -1)
        x = torch.cat([start, self.ends[drafted[:, :-1]]], 1)
        # Places beyond those that Whisper knows, which no speech fills, share the last.
        x = x + self.positions[place.clamp(max=len(self.positions) - 1)]
        around = pad(vectors, (0, 0, 1, 1)).unfold(1, NEIGHBOURS, 1).transpose(2, 3).flatten(2)
        told = self.heard(self.heard_norm(embeds)) + self.drafted(around)
        x = torch.cat([x[:, :lead], x[:, lead:] + told], 1)
        seen = (place[:, None] >= place) & real[:, None, None]
        for layer in self.layers:
            x = layer(x, seen, states, mask[:, None, None])
        own = self.norm(x[real & (place >= lead)])
        return linear(own, self._answers(), self.bias).float() + self.share * scores

    def _answers(self) -> Tensor:
        """The output layer ``[vocab, size]``; worked out once where weights do not change."""
        if self._written is not None:
            return self._written
        with torch.autocast(self.begins.device.type, enabled=False):  # has no sparse products
            written = self.begins + self.spelt @ self.runs
        if not self.training:
            self._written = written
        return written

    @torch.inference_mode()
    def revise(self, states: Tensor, mask: Tensor, draft: Draft, scores: Tensor) -> Tensor:
        """As called, in the precision in which the device multiplies fastest."""
        on_cpu = states.device.type == "cpu"
        dtype = wide_matmul_dtype() if on_cpu else torch.bfloat16
        with torch.autocast(states.device.type, dtype, enabled=dtype is not torch.float32):
            return self(states, mask, draft, scores)  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Write what is trained, in 8 bits, and the config into a recogniser's folder, each beside
        and then renamed."""
        save_module(self, self.config, folder, WEIGHTS, config_name=CONFIG, eight_bits=True)

    @classmethod
    def load(cls, folder: Path, pieces: Pieces, recogniser: str) -> Deliberation:
        """What ``save`` wrote, in float32, with the decoder that its config names. Raises
        ModelError if it is not there, not whole, not of its config, or trained for a recogniser
        other than the one of the sha256 ``recogniser``."""
        config = load_config(folder, DeliberationConfig, NAME, CONFIG)
        if config.recogniser != recogniser:
            raise ModelError(
                f"the second pass in {folder} was trained for another recogniser than the one "
                "beside it; train it again, or delete it"
            )
        decoder = Decoder.load(config.speech_encoder, pieces)
        module = load_module(
            lambda config: cls(config, pieces, decoder),
            DeliberationConfig,
            folder,
            WEIGHTS,
            NAME,
            config_name=CONFIG,
        )
        return module.eval()


def _norm(weights: dict[str, Tensor], name: str) -> nn.LayerNorm:
    """A layer's norm, trained on from what it is."""
    gain, shift = weights[f"{name}/gamma"], weights[f"{name}/beta"]
    made = nn.LayerNorm(len(gain))
    made.weight, made.bias = nn.Parameter(gain.clone()), nn.Parameter(shift.clone())
    return made

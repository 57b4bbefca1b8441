"""A second pass: Whisper's decoder reads what a recogniser wrote, all pieces at once.

An extension of ours to CLSR; passes of that kind are known as deliberation (Hu et al., arXiv
2003.07962). The speech encoder of a recogniser has a decoder, which writes token after token, each
from those before it and from what it finds in the clip. Given a whole draft it says in one parallel
pass, at every place, which token it would write next, and since it has learnt from far more speech
than a recogniser here, both together are right more often than either. Nothing of it is trained.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from narrows.errors import ModelError
from narrows.model import ctranslate2, hub
from narrows.ops.native import wide_matmul_dtype
from narrows.retrieve.clsr import Draft, Pieces
from narrows.retrieve.speech_head import WHOLE, filled_up

PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
"""What stands before the first token that Whisper writes."""
BEHIND = 1.5
"""By how much a piece scores less for each token of Whisper's it has beyond one: all that begin
with the same one would score alike."""
SHARE = 1.5
"""What the recogniser's log-probabilities count beside Whisper's. Both are the best of what was
tried on clips of articles that recognisers learn from."""


class Deliberation(nn.Module):
    """The second pass.

    Args:
        weights: a Whisper decoder's, float32, by their names in CTranslate2's form.
        tokenizer: Whisper's.
        pieces: of the text encoder in which the recogniser writes. Whisper's tokens stand for
            them: the last of a piece for it as drafted, the first of it for it as expected.
    """

    special: Tensor
    prompt: Tensor
    drafted: Tensor
    expected: Tensor
    bias: Tensor

    def __init__(self, weights: dict[str, Tensor], tokenizer: Tokenizer, pieces: Pieces) -> None:
        super().__init__()
        texts = [n.removeprefix("##") if n.startswith("##") else f" {n}" for n in pieces.names]
        split = [one.ids or [0] for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
        table = weights["embeddings/weight"]
        self.heads = int(weights["num_heads"])
        self.layers = sum(name.endswith("/ffn/linear_0/weight") for name in weights)
        self._names = {name: name.replace("/", "_") for name in weights if name != "num_heads"}
        frozen = {own: weights[name] for name, own in self._names.items() if "embed" not in name}
        frozen |= {
            "special": pieces.special,
            "prompt": table[[tokenizer.token_to_id(one) for one in PROMPT]],
            "drafted": table[[ids[-1] for ids in split]],
            "expected": table[[ids[0] for ids in split]],
            "bias": -BEHIND * torch.tensor([len(ids) - 1.0 for ids in split]),
        }
        device = pieces.table.device
        self.dtype = wide_matmul_dtype() if device.type == "cpu" else torch.bfloat16
        for name, value in frozen.items():
            matrix = name == "expected" or name.endswith("_weight")
            own = value.to(device, self.dtype if matrix else None)
            self.register_buffer(name, own, persistent=False)

    @property
    def state_size(self) -> int:
        """Of the states it attends to."""
        return self.expected.shape[1]

    @classmethod
    def load(cls, name: str, pieces: Pieces) -> Deliberation:
        """By the decoder of the model called ``name`` (see ``narrows.model.hub.resolve``). Raises
        ModelError."""
        folder = hub.resolve(name)
        weights = _weights(folder / ctranslate2.WEIGHTS, "decoder/")
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise ModelError(f"cannot read the tokenizer in {folder}: {error}") from None
        return cls(weights, tokenizer, pieces)

    @torch.inference_mode()
    def forward(self, states: Tensor, mask: Tensor, draft: Draft, scores: Tensor) -> Tensor:
        """Float32 scores ``[R, vocab]`` for all places of a draft, clip after clip: the mean of
        Whisper's log-probabilities and, weighed by SHARE, the recogniser's; minus infinity for
        special pieces.

        Args:
            states: ``[B, T, state_size]``, what the draft was made from.
            mask: bool ``[B, T]``, which of them are not padding.
            draft: what a recogniser made of them.
            scores: the recogniser's, ``[R, vocab]``.
        """
        own = scores.masked_fill(self.special, -math.inf).log_softmax(1)
        ids = torch.zeros(draft.places.shape, dtype=torch.long, device=own.device)
        ids[draft.places] = own.argmax(1)
        narrow = self.dtype is not torch.float32
        with torch.autocast(states.device.type, self.dtype, enabled=narrow):
            x = self._read(states.masked_fill(~mask[:, :, None], 0.0), mask, ids, draft.counts)
            rows = filled_up(x, WHOLE)
            whispers = linear(rows, self.expected, self.bias)[: len(x)].float()
        whispers = whispers.masked_fill_(self.special, -math.inf).log_softmax(1)
        return whispers.add_(own, alpha=SHARE).div_(1 + SHARE)

    def _read(self, states: Tensor, mask: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        """What Whisper's decoder makes of each place ``[R, size]``, given the pieces before it."""
        lead = len(self.prompt) - 1
        start = self.prompt.expand(len(ids), -1, -1)
        x = torch.cat([start, self.drafted[ids[:, :-1]]], 1)
        place = torch.arange(x.shape[1], device=x.device)
        real = place < counts[:, None] + lead
        seen = (place[:, None] >= place) & real[:, None, None]
        # Places beyond those that Whisper knows, which no speech fills, share the last.
        positions = self._of("position_encodings/encodings")
        x = x + positions[place.clamp(max=len(positions) - 1)]
        for i in range(self.layers):
            x = self._layer(f"layer_{i}/", x, seen, states, mask[:, None, None])
        return self._normed(x[real & (place >= lead)], "layer_norm")

    def _layer(self, name: str, x: Tensor, seen: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Attention to what was written, to the clip, feed-forward."""
        own = f"{name}self_attention/"
        q, k, v = self._heads(self._linear(self._normed(x, f"{own}layer_norm"), f"{own}linear_0"))
        found = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self._linear(found.transpose(1, 2).flatten(2), f"{own}linear_1")
        own = f"{name}attention/"
        (q,) = self._heads(self._linear(self._normed(x, f"{own}layer_norm"), f"{own}linear_0"))
        k, v = self._heads(self._linear(states, f"{own}linear_1"))
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self._linear(found.transpose(1, 2).flatten(2), f"{own}linear_2")
        own = f"{name}ffn/"
        inner = gelu(self._linear(self._normed(x, f"{own}layer_norm"), f"{own}linear_0"))
        return x + self._linear(inner, f"{own}linear_1")

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, N, parts * size]`` -> ``[parts, B, heads, N, dim]``."""
        split: Tensor = x.view(*x.shape[:2], -1, self.heads, self.state_size // self.heads)
        return split.permute(2, 0, 3, 1, 4)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self._of(f"{name}/weight"), self._of(f"{name}/bias"))

    def _normed(self, x: Tensor, name: str) -> Tensor:
        gain, shift = self._of(f"{name}/gamma"), self._of(f"{name}/beta")
        return layer_norm(x, gain.shape, gain, shift)

    def _of(self, name: str) -> Tensor:
        """A weight by its name."""
        return self.get_buffer(self._names[name])


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
            if name.endswith("/weight") and not dtype.is_floating_point:
                raise ModelError(f"{path} stores weights as {one.dtype} codes; take float16")
            file.seek(one.offset)
            values = torch.frombuffer(bytearray(file.read(one.nbytes)), dtype=dtype)
            wide = values.float() if dtype.is_floating_point else values
            found[name.removeprefix(begin)] = wide.reshape(one.shape)
    return found

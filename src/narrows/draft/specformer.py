"""SpecFormer: one small module that forecasts several tokens of a frozen model in one pass.

After Shi et al., "Scaling LLM Speculative Decoding: Non-Autoregressive Forecasting in Large-Batch
Scenarios" (arXiv 2511.20340), section numbers as in our design sheet. Hidden states of the target,
tapped at four depths, are normalised and fused; one causal attention over the context follows, with
a cache of its own, one more layer of the sequence's; a position-wise layer turns each position
into ``slots`` vectors, which see each other without a mask; the target's own norm and head make
tokens of them. The state at position t forecasts tokens t + 2, t + 3, ...; token t + 1 is the
target's.

Extensions beyond the paper, all off unless the config names them: ``anchor`` tells the slots the
target's token t + 1, which the state at t only implies; ``markov`` adds to the scores of each token
a term of low rank for the token before it, after DSpark (arXiv 2607.05147); ``draft_vocab``
guesses only from a part of the vocabulary, so that the head is read in part.

The target is never changed. ``narrows.draft.specformer_drafter`` runs the module beside an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from narrows.config import Settings
from narrows.model.flat import FlatModel
from narrows.model.saved import load_module, save_module
from narrows.ops import native
from narrows.ops.rotary import turn

WEIGHTS = "specformer.safetensors"


class SpecFormerConfig(Settings):
    """The module's sizes, which are its target's, and what it belongs to.

    ``taps`` are numbers of hidden states as ``FlatModel.hidden_and_taps`` counts them; the last is
    the one after the final norm. ``draft_attention`` "causal" and ``positional`` False (slots that
    differ by a learned bias only) are the ablations of the paper's table 4. ``anchor``, ``markov``
    (a rank; 0 leaves it out) and ``draft_vocab`` (tokens guessed from; None all) are extensions.
    ``fingerprint`` is the target's, see ``FlatModel.fingerprint``.
    """

    hidden_size: Annotated[int, Field(ge=1)]
    heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=2)]
    intermediate_size: Annotated[int, Field(ge=1)]
    vocab_size: Annotated[int, Field(ge=2)]
    taps: tuple[int, ...]
    slots: Annotated[int, Field(ge=1, le=16)] = 8
    eps: Annotated[float, Field(gt=0.0)] = 1e-5
    draft_attention: Literal["bidirectional", "causal"] = "bidirectional"
    positional: bool = True
    anchor: bool = False
    markov: Annotated[int, Field(ge=0)] = 0
    draft_vocab: Annotated[int, Field(ge=2)] | None = None
    fingerprint: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")
        if not self.taps or self.taps[0] < 0 or list(self.taps) != sorted(set(self.taps)):
            raise ValueError("taps must be numbers of hidden states, from 0 on, in rising order")
        if self.draft_vocab is not None and self.draft_vocab > self.vocab_size:
            raise ValueError("draft_vocab must not exceed vocab_size")
        return self

    @classmethod
    def of(cls, model: FlatModel, **changes: Any) -> SpecFormerConfig:
        """The paper's module for ``model``: its sizes, hidden states 0, L/2, L-1 and L."""
        shape, config = model.shape, model.config
        layer = shape.layers[-1]
        layers = len(shape.layers)
        values: dict[str, Any] = {
            "hidden_size": shape.hidden_size,
            "heads": shape.heads,
            "kv_heads": layer.kv_heads,
            "head_dim": layer.key_dim,
            "intermediate_size": getattr(config, "intermediate_size", 4 * shape.hidden_size),
            "vocab_size": shape.vocab_size,
            "taps": tuple(sorted({0, layers // 2, layers - 1, layers})),
            "eps": getattr(config, "rms_norm_eps", 1e-5),
            "fingerprint": model.fingerprint,
        }
        return cls(**{**values, **changes})


class GroupedRMSNorm(nn.Module):
    """Each of ``groups`` vectors ``[..., groups, size]`` over its root mean square, times its own
    learned scale (3.2). One group alone may be given as ``[..., size]``."""

    def __init__(self, groups: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Float32 inside; in x's dtype."""
        scaled = rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (scaled * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Projections of one grouped-query attention, without biases; who attends to whom is the
    caller's."""

    def __init__(self, config: SpecFormerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.heads, config.kv_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.dim
        self.norm = GroupedRMSNorm(1, config.hidden_size, config.eps)
        self.qkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.out = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` ``[..., hidden]`` -> queries, keys and values ``[..., heads, dim]``."""
        made = linear(self.norm(x), self.qkv)
        wide = made.view(*made.shape[:-1], -1, self.dim)
        keys = self.heads + self.kv_heads
        return wide[..., : self.heads, :], wide[..., self.heads : keys, :], wide[..., keys:, :]


class SpecFormer(nn.Module):
    """The module (sections 3.2 to 3.5); its weights are ``[out, in]`` as torch has them."""

    vocabulary: Tensor
    """With ``draft_vocab``, the tokens guessed from, int32, rising."""

    def __init__(self, config: SpecFormerConfig) -> None:
        super().__init__()
        self.config = config
        size, wide = config.hidden_size, config.intermediate_size
        self.fuse_norm = GroupedRMSNorm(len(config.taps), size, config.eps)
        self.fuse = nn.Linear(len(config.taps) * size, size, bias=False)
        self.context = Attention(config)
        self.spread_norm = GroupedRMSNorm(1, size, config.eps)
        self.spread = nn.Linear(size, config.slots * size) if config.positional else None
        self.slot_bias = (
            None if config.positional else nn.Parameter(torch.zeros(config.slots, size))
        )
        self.between = Attention(config)
        self.mlp_norm = GroupedRMSNorm(1, size, config.eps)
        self.gate_up = nn.Linear(size, 2 * wide, bias=False)
        self.down = nn.Linear(wide, size, bias=False)
        self.token_norm = (
            GroupedRMSNorm(1, size, config.eps) if config.anchor or config.markov else None
        )
        self.anchor = nn.Linear(size, size, bias=False) if config.anchor else None
        named = config.draft_vocab or config.vocab_size
        self.before = nn.Linear(size, config.markov, bias=False) if config.markov else None
        self.after = nn.Linear(config.markov, named, bias=False) if config.markov else None
        if config.draft_vocab is not None:
            self.register_buffer("vocabulary", torch.arange(named, dtype=torch.int32))

    def fused(self, taps: Tensor) -> Tensor:
        """Hidden states ``[..., len(taps), hidden]`` as one vector ``[..., hidden]`` (3.2)."""
        return linear(self.fuse_norm(taps).flatten(-2), self.fuse)

    def queries(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the context attention (3.3) of ``x`` ``[..., T, hidden]`` takes: queries, keys and
        values ``[..., T, heads, dim]``, rotated by ``[..., T, dim]``."""
        q, k, v = self.context.project(x)
        return rotate(q, cosine, sine), rotate(k, cosine, sine), v

    def attended(self, x: Tensor, mixed: Tensor) -> Tensor:
        """``x`` with the context attention's outcome ``[..., T, heads, dim]`` added."""
        return x + linear(mixed.flatten(-2), self.context.out)

    def slots(self, x: Tensor, newest: Tensor, most: int | None = None) -> Tensor:
        """Context vectors ``[n, hidden]`` -> the first ``most`` slots ``[n, most, hidden]``, ready
        for the target's norm and head (3.4, 3.5). All slots attend, whatever ``most``. ``newest``
        ``[n, hidden]`` embeds the token behind each context, which only an anchor looks at."""
        config = self.config
        y = self.spread_norm(x)
        if self.anchor is not None:
            y = y + linear(self._named(newest), self.anchor)
        if self.spread is not None:
            drafts = linear(y, self.spread).view(len(x), config.slots, -1)
        else:
            assert self.slot_bias is not None
            drafts = y[:, None] + self.slot_bias
        drafts = self.between_slots(drafts)[:, : most or config.slots]
        gate_up = linear(self.mlp_norm(drafts), self.gate_up)
        gate, up = gate_up.chunk(2, -1)
        return drafts + linear(silu(gate) * up, self.down)

    def between_slots(self, drafts: Tensor) -> Tensor:
        """``drafts`` ``[n, slots, hidden]`` with the attention among the slots of each row added.
        Without a mask no slot has a place but what the layer before gave it."""
        q, k, v = (x.transpose(1, 2) for x in self.between.project(drafts))
        causal = self.config.draft_attention == "causal"
        mixed = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return drafts + linear(mixed.transpose(1, 2).flatten(-2), self.between.out)

    def narrowed(self, token: Tensor) -> Tensor | None:
        """Embedded tokens ``[n, hidden]`` as ``followers`` takes them, ``[n, markov]``; None
        without ``markov``."""
        return None if self.before is None else linear(self._named(token), self.before)

    def followers(self, narrowed: Tensor) -> Tensor:
        """What tokens add to the scores of those that follow each, ``[n, draft_vocab]``."""
        assert self.after is not None
        return linear(narrowed, self.after)

    def _named(self, token: Tensor) -> Tensor:
        assert self.token_norm is not None
        return self.token_norm(token)  # type: ignore[no-any-return]

    def forward(self, taps: Tensor, cosine: Tensor, sine: Tensor, lengths: Sequence[int]) -> Tensor:
        """Context vectors ``[T, hidden]`` of whole sequences of ``lengths``, end to end in
        ``taps`` ``[T, len(taps), hidden]``, each in one causal pass: for training."""
        x = self.fused(taps)
        rows = [torch.split(y, list(lengths)) for y in self.queries(x, cosine, sine)]
        mixed = []
        for parts in zip(*rows, strict=True):
            q, k, v = (y.transpose(0, 1)[None] for y in parts)
            one = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed.append(one[0].transpose(0, 1))
        return self.attended(x, torch.cat(mixed))

    def save(self, folder: Path) -> None:
        """Write the weights as bfloat16 and the config, each beside and then renamed."""
        save_module(self, self.config, folder, WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> SpecFormer:
        """What ``save`` wrote, in float32. Raises ModelError if it is not there, not whole or not
        of its config."""
        return load_module(cls, SpecFormerConfig, folder, WEIGHTS, "SpecFormer")


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)``; without gradients by the fast products, which read bfloat16 weights as they
    are."""
    if torch.is_grad_enabled() or x.dtype not in (torch.float32, layer.weight.dtype):
        return layer(x)  # type: ignore[no-any-return]
    bias = None if layer.bias is None else layer.bias.float()
    return native.linear(x.flatten(0, -2), layer.weight, bias).view(*x.shape[:-1], -1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of ``x`` ``[..., T, heads, dim]``, halves against each other."""
    if not torch.is_grad_enabled() and x.is_cpu and x.ndim == 3 and x.dtype is torch.float32:
        turned = x.contiguous()
        native.norm_rotate_(turned, None, 0.0, cosine, sine)
        return turned
    return turn(x, cosine, sine)

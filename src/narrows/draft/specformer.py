"""SpecFormer: one small module that forecasts several tokens of a frozen model in one pass.

After Shi et al., "Scaling LLM Speculative Decoding: Non-Autoregressive Forecasting in Large-Batch
Scenarios" (arXiv 2511.20340), section numbers as in our design sheet. Hidden states of the target,
tapped at four depths, are normalised and fused; one causal attention over the context follows, with
a cache of its own, one more layer of the sequence's; a position-wise layer turns each position
into ``slots`` vectors, which see each other without a mask; the target's own norm and head make
tokens of them. The state at position t forecasts tokens t + 2, t + 3, ...; token t + 1 is the
target's.

``SpecFormer`` is the module, for training and for use; ``SpecFormerDrafter`` runs it beside an
engine. The target is never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from narrows.cache.dense import DenseLayer, DensePolicy
from narrows.config import Settings
from narrows.contracts import Asked, Draft, Drafter, FlatBatch, LayerCache, LayerShape, Offer
from narrows.errors import ConfigError, ModelError
from narrows.model.flat import FlatModel
from narrows.ops import native

WEIGHTS, CONFIG = "specformer.safetensors", "config.json"


class SpecFormerConfig(Settings):
    """The module's sizes, which are its target's, and what it belongs to.

    ``taps`` are numbers of hidden states as ``FlatModel.hidden_and_taps`` counts them; the last is
    the one after the final norm. ``draft_attention`` "causal" and ``positional`` False (slots that
    differ by a learned bias only) are the ablations of the paper's table 4. ``fingerprint`` is the
    target's, see ``FlatModel.fingerprint``.
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
    fingerprint: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")
        if not self.taps or list(self.taps) != sorted(set(self.taps)):
            raise ValueError("taps must rise")
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
    learned scale (3.2)."""

    def __init__(self, groups: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Float32 inside; in x's dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight.float()).to(x.dtype)


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
        made = linear(self.norm(x[..., None, :])[..., 0, :], self.qkv)
        wide = made.view(*made.shape[:-1], -1, self.dim)
        keys = self.heads + self.kv_heads
        return wide[..., : self.heads, :], wide[..., self.heads : keys, :], wide[..., keys:, :]


class SpecFormer(nn.Module):
    """The module (sections 3.2 to 3.5); its weights are ``[out, in]`` as torch has them."""

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

    def slots(self, x: Tensor, most: int | None = None) -> Tensor:
        """Context vectors ``[n, hidden]`` -> the first ``most`` slots ``[n, most, hidden]``, ready
        for the target's norm and head (3.4, 3.5). All slots attend, whatever ``most``."""
        config = self.config
        y = self.spread_norm(x[:, None])[:, 0]
        if self.spread is not None:
            drafts = linear(y, self.spread).view(len(x), config.slots, -1)
        else:
            assert self.slot_bias is not None
            drafts = y[:, None] + self.slot_bias
        drafts = self.between_slots(drafts)[:, : most or config.slots]
        gate_up = linear(self.mlp_norm(drafts[..., None, :])[..., 0, :], self.gate_up)
        gate, up = gate_up.chunk(2, -1)
        return drafts + linear(silu(gate) * up, self.down)

    def between_slots(self, drafts: Tensor) -> Tensor:
        """``drafts`` ``[n, slots, hidden]`` with the attention among the slots of each row added.
        Without a mask no slot has a place but what the layer before gave it."""
        q, k, v = (x.transpose(1, 2) for x in self.between.project(drafts))
        causal = self.config.draft_attention == "causal"
        mixed = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return drafts + linear(mixed.transpose(1, 2).flatten(-2), self.between.out)

    def forward(self, taps: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Context vectors ``[B, T, hidden]`` of whole sequences, ``taps`` ``[B, T, len(taps),
        hidden]``, in one causal pass: for training."""
        x = self.fused(taps)
        q, k, v = (y.transpose(1, 2) for y in self.queries(x, cosine, sine))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.attended(x, mixed.transpose(1, 2))

    def save(self, folder: Path) -> None:
        """Write the weights as bfloat16 and the config, each beside and then renamed."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().bfloat16().contiguous() for k, v in self.state_dict().items()}
        for name in (WEIGHTS, CONFIG):
            beside = folder / f".{name}.part"
            if name == WEIGHTS:
                save_file(weights, beside)
            else:
                beside.write_text(self.config.model_dump_json(indent=1) + "\n")
            os.replace(beside, folder / name)

    @classmethod
    def load(cls, folder: Path) -> SpecFormer:
        """What ``save`` wrote, in float32. Raises ModelError if it is not there, not whole or not
        of its config."""
        try:
            config = SpecFormerConfig(**json.loads((folder / CONFIG).read_text()))
            weights = load_file(folder / WEIGHTS)
        except ConfigError as error:
            raise ModelError(f"{folder / CONFIG} is not a SpecFormer's: {error}") from None
        except Exception as error:
            raise ModelError(f"cannot read a SpecFormer from {folder}: {error}") from None
        with torch.device("meta"):
            module = cls(config)
        expected = {k: v.shape for k, v in module.state_dict().items()}
        if {k: v.shape for k, v in weights.items()} != expected:
            raise ModelError(f"the weights in {folder} do not belong to its {CONFIG}")
        module.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
        return module


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)``; without gradients by the fast products, which read bfloat16 weights as they
    are."""
    if torch.is_grad_enabled() or x.dtype not in (torch.float32, layer.weight.dtype):
        return layer(x)  # type: ignore[no-any-return]
    bias = None if layer.bias is None else layer.bias.float()
    return native.linear(x.flatten(0, -2), layer.weight, bias).view(*x.shape[:-1], -1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of ``x`` ``[..., T, heads, dim]``, halves against each other."""
    a, b = x.chunk(2, -1)
    turned = torch.cat([-b, a], -1)
    return x * cosine[..., None, :].to(x.dtype) + turned * sine[..., None, :].to(x.dtype)


class SpecFormerDrafter(Drafter):
    """A trained module beside its target. Guesses are the likeliest tokens of the slots.

    Raises ConfigError if the module belongs to another target.
    """

    name = "specformer"

    def __init__(self, module: SpecFormer, target: FlatModel) -> None:
        config = module.config
        check_target(config, target)
        self.target = target
        self.module = (
            module.to(target.shape.device, target.shape.dtype).eval().requires_grad_(False)
        )
        self.most, self.taps = config.slots, config.taps
        self.scale = config.head_dim**-0.5
        self.layer = len(target.shape.layers)
        self.shape = LayerShape(config.kv_heads, config.head_dim, config.head_dim)
        self._rows: Tensor | None = None
        self._states: dict[int, Tensor] = {}

    def build(self) -> list[LayerCache]:
        """See Drafter."""
        target = self.target.shape
        return [DenseLayer(self.shape, target.dtype, target.device)]

    def estimate(self, tokens: int) -> int:
        """See Drafter."""
        return DensePolicy().estimate(replace(self.target.shape, layers=(self.shape,)), tokens)

    @torch.inference_mode()
    def read(self, taps: Tensor, positions: Tensor, batch: FlatBatch) -> None:
        """See Drafter."""
        module = self.module
        x = module.fused(taps)
        cosine, sine = self.target.rotary(positions)
        q, k, v = module.queries(x, cosine, sine)
        mixed = batch.attend(self.layer, q.contiguous(), k.contiguous(), v.contiguous(), self.scale)
        self._rows = module.attended(x, mixed.to(x.dtype))

    def keep(self, numbers: Sequence[int], rows: Sequence[int]) -> None:
        """See Drafter."""
        assert self._rows is not None
        for number, row in zip(numbers, rows, strict=True):
            self._states[number] = self._rows[row].clone()
        self._rows = None

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """See Drafter."""
        return [[Offer(self.name, one.k)] if one.number in self._states else [] for one in asked]

    @torch.inference_mode()
    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See Drafter. One pass for all."""
        if not asked:
            return []
        states = torch.stack([self._states[one.number] for one in asked])
        best = self.logits(states, max(one.k for one in asked)).argmax(-1).tolist()
        return [Draft(row[: one.k]) for one, row in zip(asked, best, strict=True)]

    def logits(self, states: Tensor, most: int) -> Tensor:
        """Scores of the first ``most`` slots of context vectors ``[n, hidden]``:
        ``[n, most, vocab_size]``."""
        slots = self.module.slots(states, most)
        scores = self.target.logits(self.target.final_norm(slots.flatten(0, 1)))
        return scores.view(len(states), most, -1)

    def forget(self, number: int) -> None:
        """See Drafter."""
        self._states.pop(number, None)


def check_target(config: SpecFormerConfig, target: FlatModel) -> None:
    """Raises ConfigError unless a module of ``config`` was made for ``target``."""
    for what, own, theirs in (
        ("hidden size", config.hidden_size, target.shape.hidden_size),
        ("vocabulary", config.vocab_size, target.shape.vocab_size),
        ("last tapped state", config.taps[-1], len(target.shape.layers)),
        ("fingerprint", config.fingerprint, target.fingerprint),
    ):
        if own != theirs:
            raise ConfigError(
                f"this drafter belongs to another model than {target.name}: its {what} is "
                f"{own}, the model's {theirs}"
            )

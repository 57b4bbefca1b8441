"""The flat forward pass, tuned for the CPU: same weights, fewer and larger operators.

transformers' model code stays the reference. For the families whose layers are "norm, grouped
attention with rotary keys, norm, gated MLP" this module runs the same arithmetic with query,
key and value (and gate and up) in one product each, activations in float32, and the kernels of
``narrows.ops.native``. The fused weights replace the model's own storage: its parameters become
views into them, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrows.contracts import FlatBatch, ModelShape
from narrows.ops.native import add_rms_norm, flow_dtype, linear, norm_rotate_, silu_mul

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@dataclass(slots=True)
class Layer:
    """Weights of one decoder layer; norms and biases are float32."""

    first_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    second_norm: Tensor
    gate_up: Tensor
    down: Tensor
    scale: float


class FastDecoder:
    """``FlatModel.hidden`` and ``logits`` on the CPU. Build with ``FastDecoder.of``."""

    def __init__(self, model: Any, shape: ModelShape) -> None:
        base = model.base_model
        self.shape = shape
        self.embed: Tensor = base.embed_tokens.weight
        self.rotary: nn.Module = base.rotary_emb
        self.eps: float = model.config.rms_norm_eps
        self.norm: Tensor = base.norm.weight.float()
        self.head: Tensor = model.get_output_embeddings().weight
        self.layers = [_layer(x) for x in base.layers]

    @classmethod
    def of(cls, model: Any, shape: ModelShape) -> FastDecoder | None:
        """The tuned pass for ``model``, or None where only the reference is right: another
        family, another device, float16, or an MLP that is not a plain gated SiLU."""
        config = model.config
        if shape.family not in FAMILIES or shape.device.type != "cpu":
            return None
        if shape.dtype not in (torch.float32, torch.bfloat16) or config.hidden_act != "silu":
            return None
        if any(x.mlp.gate_proj.bias is not None for x in model.base_model.layers):
            return None
        return cls(model, shape)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        batch: FlatBatch,
        tap: Callable[[int, Tensor], None] = lambda number, states: None,
    ) -> Tensor:
        """As ``FlatModel.hidden``; float32 whatever the weights are. ``tap`` is shown the states
        that enter each layer, which later ones overwrite."""
        shape, count = self.shape, ids.shape[0]
        h = self.embed[ids].float()
        # float32 input makes the rotary module give float32 tables.
        cosine, sine = (t[0].contiguous() for t in self.rotary(h[None], positions[None]))
        delta = None
        flow = flow_dtype(count, self.embed.dtype)
        for number, (layer, facts) in enumerate(zip(self.layers, shape.layers, strict=True)):
            x = add_rms_norm(h, delta, layer.first_norm, self.eps, flow)
            tap(number, h)
            qkv = linear(x, layer.qkv, layer.qkv_bias).float()
            rotated = shape.heads + facts.kv_heads
            turning, v = qkv.tensor_split((rotated * facts.key_dim,), 1)
            turning = turning.view(count, rotated, facts.key_dim)
            q, k = turning[:, : shape.heads], turning[:, shape.heads :]
            v = v.view(count, facts.kv_heads, facts.value_dim)
            if layer.q_norm is None:
                norm_rotate_(turning, None, self.eps, cosine, sine)
            else:
                norm_rotate_(q, layer.q_norm, self.eps, cosine, sine)
                norm_rotate_(k, layer.k_norm, self.eps, cosine, sine)
            mixed = batch.attend(number, q, k, v, layer.scale).reshape(count, -1)
            delta = linear(mixed.to(flow), layer.out, layer.out_bias)
            x = add_rms_norm(h, delta, layer.second_norm, self.eps, flow)
            delta = linear(silu_mul(linear(x, layer.gate_up)), layer.down)
        return add_rms_norm(h, delta, self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """As ``FlatModel.logits``."""
        return linear(hidden, self.head)


def _layer(module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    q_norm = getattr(attention, "q_norm", None)
    k_norm = getattr(attention, "k_norm", None)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [p.bias for p in projections]
    return Layer(
        first_norm=module.input_layernorm.weight.float(),
        qkv=_fuse(projections),
        qkv_bias=None if biases[0] is None else torch.cat(biases).float(),
        q_norm=None if q_norm is None else q_norm.weight.float(),
        k_norm=None if k_norm is None else k_norm.weight.float(),
        out=attention.o_proj.weight.contiguous(),
        out_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.float(),
        second_norm=module.post_attention_layernorm.weight.float(),
        gate_up=_fuse((mlp.gate_proj, mlp.up_proj)),
        down=mlp.down_proj.weight.contiguous(),
        scale=float(attention.scaling),
    )


def _fuse(projections: tuple[Any, ...]) -> Tensor:
    """One weight of all rows; the projections' own weights become views into it."""
    whole = torch.cat([p.weight for p in projections])
    start = 0
    for p in projections:
        rows = p.weight.shape[0]
        p.weight.data = whole[start : start + rows]
        start += rows
    return whole

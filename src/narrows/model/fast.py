"""The flat forward pass, tuned for the CPU: same weights, fewer and larger operators.

transformers' model code stays the reference. For the families whose layers are "norm, grouped
attention with rotary keys, norm, gated MLP" this module runs the same arithmetic with query,
key and value (and gate and up) in one product each, activations in float32, and the kernels of
``narrows.ops.native``. Weights move to huge pages, and the model's parameters become views into
them, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from narrows.contracts import FlatBatch, LayerShape, ModelShape
from narrows.ops.decoder import Decoder, Layer, after_attention, before_attention
from narrows.ops.native import add_rms_norm, gather_rows, linear, linear_maxima
from narrows.ops.pages import reserve

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


class FastDecoder:
    """``FlatModel.hidden`` and ``logits`` on the CPU. Build with ``FastDecoder.of``."""

    def __init__(self, model: Any, shape: ModelShape) -> None:
        base = model.base_model
        assert shape.rotary is not None
        self.rotary = shape.rotary
        self.eps: float = model.config.rms_norm_eps
        self.norm: Tensor = base.norm.weight.float()
        products = [p for layer in base.layers for p in _products(layer)]
        *weights, self.head = _gather([*products, [model.get_output_embeddings()]])
        self.embed: Tensor = base.embed_tokens.weight  # which may be the head
        self.layers = [
            _layer(x, shape, facts, self.eps, weights[4 * number : 4 * number + 4])
            for number, (x, facts) in enumerate(zip(base.layers, shape.layers, strict=True))
        ]
        self.at_once = Decoder(self.layers)

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
        taps: Mapping[int, Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """As ``FlatModel.hidden``; float32 whatever the weights are. What enters layer ``i`` is
        written to ``taps[i]``, float32 ``[n, hidden_size]``: those of ``rows``, None: of all."""
        h, taps = gather_rows(self.embed, ids), taps or {}
        cosine, sine = self.rotary(positions)
        places = batch.places() if self.at_once.takes(len(h)) else None
        if places is None:
            delta = self._one_by_one(h, cosine, sine, batch, taps, rows)
        else:
            delta = self.at_once(h, cosine, sine, places, taps, rows)
            batch.settle()
        return add_rms_norm(h, delta, self.norm, self.eps)

    def _one_by_one(
        self,
        h: Tensor,
        cosine: Tensor,
        sine: Tensor,
        batch: FlatBatch,
        taps: Mapping[int, Tensor],
        rows: Tensor | None,
    ) -> Tensor | None:
        """As ``at_once``, for all caches."""
        count, delta = len(h), None
        for number, layer in enumerate(self.layers):
            qkv = before_attention(layer, h, delta, cosine, sine)
            if number in taps:
                taps[number].copy_(h if rows is None else h[rows])
            q, k, v = qkv.tensor_split(layer.ends, 1)
            mixed = batch.attend(
                number,
                q.view(count, layer.heads, layer.key_dim),
                k.view(count, layer.kv_heads, layer.key_dim),
                v.view(count, layer.kv_heads, layer.value_dim),
                layer.scale,
            )
            delta = after_attention(layer, h, mixed.reshape(count, -1))
        return delta

    def logits(self, hidden: Tensor, room: Tensor | None) -> Tensor:
        """As ``FlatModel.logits``."""
        return linear(hidden, self.head, room=room)

    def best(self, hidden: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
        """As ``FlatModel.best``."""
        return linear_maxima(hidden, self.head, room)


def _products(layer: Any) -> list[list[nn.Module]]:
    """What a layer multiplies with, in four products."""
    attention, mlp = layer.self_attn, layer.mlp
    into = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [into, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]


def _gather(products: Sequence[Sequence[Any]]) -> list[Tensor]:
    """One weight for each product; those of its modules become views into it, and what they were
    is let go before the next is read."""
    wanted = []
    for modules in products:
        first = modules[0].weight
        wanted.append(((sum(len(m.weight) for m in modules), first.shape[1]), first.dtype))
    made = reserve(wanted)
    for whole, modules in zip(made, products, strict=True):
        start = 0
        for module in modules:
            part = whole[start : start + len(module.weight)]
            module.weight.data = part.copy_(module.weight.data)
            start += len(part)
    return made


def _layer(
    module: Any, shape: ModelShape, facts: LayerShape, eps: float, weights: Sequence[Tensor]
) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    q_norm = getattr(attention, "q_norm", None)
    k_norm = getattr(attention, "k_norm", None)
    biases = [p.bias for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    qkv, out, gate_up, down = weights
    return Layer(
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        first_norm=module.input_layernorm.weight.float(),
        second_norm=module.post_attention_layernorm.weight.float(),
        qkv_bias=None if biases[0] is None else torch.cat(biases).float(),
        out_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.float(),
        q_norm=None if q_norm is None else q_norm.weight.float(),
        k_norm=None if k_norm is None else k_norm.weight.float(),
        hidden=shape.hidden_size,
        heads=shape.heads,
        kv_heads=facts.kv_heads,
        key_dim=facts.key_dim,
        value_dim=facts.value_dim,
        wide=mlp.down_proj.in_features,
        eps=eps,
        scale=float(attention.scaling),
    )

"""Facts per model family: which architectures run, and the shape of their layers.

A family is listed only if the flat forward pass is exact for it: causal attention with
optional sliding windows, softmax without logit caps, positions given per token.
"""

from __future__ import annotations

from typing import Any

import torch

from narrows.contracts import LayerShape, ModelShape
from narrows.errors import UnsupportedModel
from narrows.model.latent import PREFIX, head_dim, value_head_dim

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt2")


def family_of(config: Any) -> str:
    """The architecture, of a converted model its base's."""
    return str(getattr(config, "model_type", None)).removeprefix(PREFIX)


def check_supported(config: Any) -> None:
    """Raises UnsupportedModel, by name, for an architecture or option we do not run exactly."""
    family = family_of(config)
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"model type {family!r} is not supported (supported: {', '.join(FAMILIES)})"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModel(f"{family} with attn_logit_softcapping is not supported")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModel(f"{family} with use_bidirectional_attention is not supported")


def model_shape(config: Any, dtype: torch.dtype, device: torch.device) -> ModelShape:
    """The layer shapes and limits a transformers config describes.

    Raises UnsupportedModel as ``check_supported`` does.
    """
    check_supported(config)
    heads = config.num_attention_heads
    count = config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windows = [sliding] * count
    else:
        windows = [sliding if kind == "sliding_attention" else None for kind in kinds]
    return ModelShape(
        family=family_of(config),
        layers=tuple(
            LayerShape(kv_heads, head_dim(config), value_head_dim(config), w) for w in windows
        ),
        heads=heads,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings,
        dtype=dtype,
        device=device,
    )

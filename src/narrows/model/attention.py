"""The one attention function registered with transformers.

Inside a flat forward pass a model's attention layers call ``flat_attention``, which hands
queries, keys and values to the ``FlatBatch`` that travels in the keyword arguments.
Nothing is registered at import; ``install`` is called by ``FlatModel``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from narrows.contracts import FlatBatch
from narrows.errors import UnsupportedModel

NAME = "narrows"


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    flat: FlatBatch | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: ``query`` ``[1, heads, T, dim]`` after RoPE ->
    ``([1, T, heads, dim], None)``. Causality and windows are the caches' own."""
    if flat is None:
        raise UnsupportedModel(
            "a model loaded for flat batches was called directly; use FlatModel, or load the "
            "model with another attn_implementation"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = flat.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
    )
    return out.unsqueeze(0), None


def install() -> None:
    """Make ``attn_implementation="narrows"`` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, flat_attention)

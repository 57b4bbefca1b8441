"""Decoders whose key and value heads differ in size: what a KV-Latent conversion makes.

After Shi et al., "KV-Latent: Dimensional-level KV Cache Reduction with Frequency-aware Rotary
Positional Embedding" (arXiv 2507.11273). A converted model is transformers' own, except that its
value heads have ``value_head_dim`` numbers and its key heads ``head_dim``; where both are equal it
is transformers' own entirely, under another name. Importing this module makes the names known to
the auto classes; importing ``narrows`` does so as soon as transformers is imported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

PREFIX = "kv_latent_"
"""Stands before the name of the family in the model type of a converted model."""


def head_dim(config: Any) -> int:
    """Numbers in a query or key head of any model."""
    size: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return size


def value_head_dim(config: Any) -> int:
    """Numbers in a value head of a converted or any other model of our families."""
    narrow: int = getattr(config, "value_head_dim", None) or head_dim(config)
    return narrow


def is_converted(config: Any) -> bool:
    """Whether the model of ``config`` is a converted one."""
    return str(getattr(config, "model_type", None)).startswith(PREFIX)


class LatentAttention(nn.Module):
    """Grouped attention whose values have a size of their own; takes the place, and the
    projections of queries and keys, of the attention of any family that can be converted."""

    def __init__(self, stock: Any, config: Any) -> None:
        super().__init__()
        self.config = config
        self.layer_idx: int = stock.layer_idx
        self.head_dim: int = stock.head_dim
        self.num_key_value_groups: int = stock.num_key_value_groups
        self.scaling: float = stock.scaling
        self.attention_dropout: float = stock.attention_dropout
        self.is_causal = True
        self.sliding_window = getattr(
            stock, "sliding_window", getattr(config, "sliding_window", None)
        )
        self.value_head_dim = value_head_dim(config)
        wide, narrow = config.hidden_size, self.value_head_dim
        self.q_proj, self.k_proj = stock.q_proj, stock.k_proj
        self.v_proj = nn.Linear(
            wide, config.num_key_value_heads * narrow, bias=stock.v_proj.bias is not None
        )
        self.o_proj = nn.Linear(
            config.num_attention_heads * narrow, wide, bias=stock.o_proj.bias is not None
        )
        self.q_norm = getattr(stock, "q_norm", None)
        self.k_norm = getattr(stock, "k_norm", None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the attention it replaces."""
        places = hidden_states.shape[:-1]
        q, k, v = (
            project(hidden_states).view(*places, -1, size)
            for project, size in (
                (self.q_proj, self.head_dim),
                (self.k_proj, self.head_dim),
                (self.v_proj, self.value_head_dim),
            )
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attend(
            self,
            *(q, k, v, attention_mask),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(mixed.reshape(*places, -1)), weights


class _LatentModel:
    """Put before a family's causal language model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if value_head_dim(config) != config.head_dim:
            for layer in self.model.layers:  # type: ignore[attr-defined]
                layer.self_attn = LatentAttention(layer.self_attn, config)


class LatentLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """``head_dim`` is the size of a query or key head. ``kv_latent`` tells where the model comes
    from, see ``narrows.latent.convert``."""

    model_type = PREFIX + "llama"
    value_head_dim: int | None = None
    kv_latent: dict[str, Any] | None = None


class LatentQwen2Config(Qwen2Config):  # type: ignore[misc]
    """See LatentLlamaConfig."""

    model_type = PREFIX + "qwen2"
    head_dim: int | None = None
    value_head_dim: int | None = None
    kv_latent: dict[str, Any] | None = None


class LatentQwen3Config(Qwen3Config):  # type: ignore[misc]
    """See LatentLlamaConfig."""

    model_type = PREFIX + "qwen3"
    value_head_dim: int | None = None
    kv_latent: dict[str, Any] | None = None


class LatentMistralConfig(MistralConfig):  # type: ignore[misc]
    """See LatentLlamaConfig."""

    model_type = PREFIX + "mistral"
    value_head_dim: int | None = None
    kv_latent: dict[str, Any] | None = None


class LatentLlamaForCausalLM(_LatentModel, LlamaForCausalLM):  # type: ignore[misc]
    """A converted Llama."""

    config_class = LatentLlamaConfig


class LatentQwen2ForCausalLM(_LatentModel, Qwen2ForCausalLM):  # type: ignore[misc]
    """A converted Qwen2 or Qwen2.5."""

    config_class = LatentQwen2Config


class LatentQwen3ForCausalLM(_LatentModel, Qwen3ForCausalLM):  # type: ignore[misc]
    """A converted Qwen3."""

    config_class = LatentQwen3Config


class LatentMistralForCausalLM(_LatentModel, MistralForCausalLM):  # type: ignore[misc]
    """A converted Mistral."""

    config_class = LatentMistralConfig


MODELS: dict[str, Any] = {
    model.config_class.model_type.removeprefix(PREFIX): model
    for model in (
        LatentLlamaForCausalLM,
        LatentQwen2ForCausalLM,
        LatentQwen3ForCausalLM,
        LatentMistralForCausalLM,
    )
}
"""The converted model of each family that can be converted."""


for _model in MODELS.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)

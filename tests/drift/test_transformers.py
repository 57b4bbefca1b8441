"""What we lean on in transformers, so that a release that moves it is noticed here."""

from __future__ import annotations

import inspect

import pytest
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from narrows.model import attention
from tiny import FAMILIES, pair


def test_attention_functions_can_be_registered_by_name() -> None:
    attention.install()
    attention.install()
    assert AttentionInterface().get(attention.NAME) is attention.flat_attention
    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is attention.flat_attention


def test_eager_attention_still_has_the_signature_ours_mirrors() -> None:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    names = list(inspect.signature(eager_attention_forward).parameters)
    assert names[:6] == ["module", "query", "key", "value", "attention_mask", "scaling"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_the_flat_pass_reads_are_where_it_looks(family: str) -> None:
    model = pair(family)[1]
    assert model.get_output_embeddings() is not None
    assert hasattr(model, "base_model")
    if family in ("llama", "qwen2", "qwen3", "mistral"):
        base = model.base_model
        layer = base.layers[0]
        for name in ("input_layernorm", "post_attention_layernorm"):
            assert hasattr(getattr(layer, name), "weight")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "scaling", "layer_idx"):
            assert hasattr(layer.self_attn, name)
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert hasattr(layer.mlp, name)
        assert hasattr(base, "rotary_emb")


def test_gguf_can_be_loaded_dense() -> None:
    from transformers import GgufConfig

    assert "dequantize" in inspect.signature(GgufConfig).parameters

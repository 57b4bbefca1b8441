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


def test_a_cache_has_the_methods_ours_replaces_and_the_layers_it_makes() -> None:
    from transformers.cache_utils import Cache, CacheLayerMixin

    def names(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]

    assert "layers" in names(Cache.__init__)
    assert names(Cache.update)[:4] == ["self", "key_states", "value_states", "layer_idx"]
    assert names(Cache.crop) == ["self", "tokens_to_remove"]
    assert names(Cache.reorder_cache) == ["self", "beam_idx"]
    assert names(Cache.batch_select_indices) == ["self", "indices"]
    assert names(Cache.batch_repeat_interleave) == ["self", "repeats"]
    assert names(Cache.get_mask_sizes) == ["self", "query_length", "layer_idx"]
    for name in ("reset", "get_seq_length", "activate_past_recording"):
        assert callable(getattr(Cache, name))
    assert isinstance(Cache.batch_size, property)
    assert CacheLayerMixin.__abstractmethods__ == {
        "lazy_initialization",
        "update",
        "get_mask_sizes",
        "get_seq_length",
        "get_max_length",
    }
    assert names(CacheLayerMixin.update)[1:3] == ["key_states", "value_states"]
    assert names(CacheLayerMixin.get_mask_sizes) == ["self", "query_length"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_given_the_cache_and_the_padding_mask_by_name(family: str) -> None:
    import torch
    from transformers import DynamicCache

    model = pair(family)[1]
    seen: list[set[str]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    try:
        ids = torch.ones((1, 3), dtype=torch.long)
        cache = DynamicCache(config=model.config)
        model.generate(ids, attention_mask=ids, past_key_values=cache, max_new_tokens=2)
    finally:
        hook.remove()
    assert all({"past_key_values", "attention_mask"} <= names for names in seen)
    assert len(seen) == 2


def test_a_sliding_dynamic_layer_gives_the_slots_ours_gives() -> None:
    import torch
    from transformers.cache_utils import DynamicSlidingWindowLayer

    layer, k = DynamicSlidingWindowLayer(sliding_window=8), torch.zeros(1, 1, 20, 4)
    assert layer.get_mask_sizes(20) == (20, 0)
    assert layer.update(k, k)[0].shape[2] == 20
    assert layer.get_mask_sizes(3) == (10, 13)
    assert layer.update(k[:, :, :3], k[:, :, :3])[0].shape[2] == 10


def test_assisted_decoding_asks_to_record_before_it_crops() -> None:
    from transformers.generation import GenerationMixin

    source = inspect.getsource(GenerationMixin._assisted_decoding)
    assert 0 < source.index("activate_past_recording()") < source.index(".crop(-")

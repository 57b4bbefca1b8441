"""A model's rotary tables, looked up, are what its own module makes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from narrows.model.rotary import ModelRotary

TYPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        **{"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 4.0},
        "original_max_position_embeddings": 64,
    },
}


def rotary(kind: str) -> tuple[ModelRotary, torch.nn.Module]:
    config = LlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256},
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **TYPES[kind]},
    )
    base = LlamaModel(config)
    model = torch.nn.Module()
    model.base_model, model.config, model.weight = base, config, base.norm.weight
    return ModelRotary(model), base.rotary_emb


@pytest.mark.parametrize("kind", TYPES)
def test_looked_up_or_made(kind):
    """In whatever order places come, far ones before near ones and none at all; of types that
    change with the length of a text, what the module makes of the places it is given."""
    mine, module = rotary(kind)
    for places in ([3], [], [40, 2, 41], [255, 0], [17], [90, 100]):
        at = torch.tensor(places, dtype=torch.long)
        if kind in ("dynamic", "longrope") and not places:
            continue
        right = module(torch.zeros(1), at[None])
        for a, b in zip(mine(at), right, strict=True):
            assert torch.equal(a, b[0])


def test_no_place_is_below_nought():
    mine, _ = rotary("default")
    with pytest.raises(IndexError):
        mine(torch.tensor([3, -1]))
    assert len(mine(torch.tensor([3]))[0]) == 1

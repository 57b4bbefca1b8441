"""Tiny random-weight models of every supported family, in float32, the same weights twice."""

from __future__ import annotations

import functools

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from narrows.model import attention
from narrows.model.flat import FlatModel

COMMON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen2": {"head_dim": 12},
    "qwen3": {},
    "mistral": {"sliding_window": 20},
    "gemma3_text": {
        "sliding_window": 20,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 16,
    },
    "gpt2": {
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
    },
}
FAMILIES["gemma3_text"]["layer_types"] = FAMILIES["gemma3_text"]["layer_types"][:4]


def config(family: str, **changes: object) -> object:
    """The config of a tiny model of ``family``."""
    options = {**COMMON, **FAMILIES[family], **changes}
    if family == "gpt2":
        keep = {"vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}
        options = {k: v for k, v in options.items() if k in keep or k.startswith("n_")}
    return CONFIG_MAPPING[family](**options)


@functools.cache
def pair(
    family: str, dtype: torch.dtype = torch.float32, **changes: object
) -> tuple[FlatModel, torch.nn.Module]:
    """A FlatModel without a tokenizer, and a stock transformers model with the same weights.
    ``changes`` are of the config."""
    attention.install()
    torch.manual_seed(hash_of(family))
    made = config(family, **changes)
    stock = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    with torch.no_grad():  # norms away from 1 and biases away from 0, so that both matter
        for p in stock.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
    made = config(family, **changes)  # anew: a model writes its attention into its config
    flat = AutoModelForCausalLM.from_config(made, attn_implementation=attention.NAME)
    flat.load_state_dict(stock.state_dict())
    return FlatModel(flat.to(dtype), None, f"tiny-{family}"), stock.to(dtype)


def hash_of(text: str) -> int:
    """A seed that does not change between runs."""
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31


def prompts(count: int, vocabulary: int = 101, longest: int = 90, seed: int = 0) -> list[list[int]]:
    """Random token ids, of unequal length."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=g).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in lengths]

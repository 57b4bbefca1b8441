"""Tiny GGUF files with llama.cpp's layout, written from random transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "Ġ Ġ", "t h", "th e", "Ġ the"]
TOKENS = [*CONTROL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]

FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),  # not hidden_size / heads
}

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def tiny(family: str = "llama", *, tied: bool = True) -> PreTrainedModel:
    """A float32 model whose weights bfloat16 holds exactly."""
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(7)
    config = config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(TOKENS),
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=2.0**-17,
        tie_word_embeddings=tied,
        **options,
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((torch.randn_like(weight) * 0.3 + (weight.ndim == 1)).bfloat16())
    return model


def write(
    path: Path,
    model: PreTrainedModel,
    *,
    pre: str | None = "smollm",
    drop: str | None = None,
    extra: str | None = None,
    numbers: dict[str, float] | None = None,
    strings: dict[str, str] | None = None,
    flags: dict[str, bool] | None = None,
    bos: bool | None = None,
    kind: str = "gpt2",
) -> Path:
    """Write ``model`` to ``path``; leave out tensor ``drop``, add a made-up tensor ``extra`` and
    the metadata ``numbers`` (float32), ``strings`` and ``flags``."""
    config = model.config
    family = config.model_type
    out = gguf.GGUFWriter(path, family)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    if family == "qwen3":
        out.add_key_length(config.head_dim)
    if family == "llama":
        out.add_rope_dimension_count(config.head_dim)
    if kind == "llama":
        _add_sentencepiece(out)
    else:
        _add_tokenizer(out, kind, pre, bos)
    for key, number in (numbers or {}).items():
        out.add_float32(key, number)
    for key, string in (strings or {}).items():
        out.add_string(key, string)
    for key, flag in (flags or {}).items():
        out.add_bool(key, flag)
    for name, weight in model.named_parameters():
        if gguf_name(name) != drop:
            out.add_tensor(gguf_name(name), _layout(name, weight, config))
    if extra:
        out.add_tensor(extra, np.ones(4, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def gguf_name(name: str) -> str:
    """llama.cpp's name of a transformers parameter."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _layout(name: str, weight: torch.Tensor, config: Any) -> np.ndarray:
    """llama.cpp interleaves the two rotary halves of llama's query and key rows."""
    value = weight.detach().numpy()
    if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = value.shape[0] // config.head_dim
        value = value.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2)
        value = value.reshape(weight.shape)
    return np.ascontiguousarray(value)


def _add_sentencepiece(out: gguf.GGUFWriter) -> None:
    """Pieces with scores, byte pieces for the rest; as long as TOKENS, to fit the same model."""
    out.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    words = ["▁ab", "▁a", "▁", "a", "b"][: len(TOKENS) - len(pieces)]
    out.add_token_list(pieces + words)
    out.add_token_types(types + [1] * len(words))
    out.add_token_scores([0.0] * len(pieces) + [-float(i) for i in range(len(words))])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)


def _add_tokenizer(out: gguf.GGUFWriter, kind: str, pre: str | None, bos: bool | None) -> None:
    out.add_tokenizer_model(kind)
    if pre is not None:
        out.add_tokenizer_pre(pre)
    out.add_token_list(TOKENS)
    out.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    out.add_token_merges(MERGES)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    if bos is not None:
        out.add_add_bos_token(bos)
    out.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

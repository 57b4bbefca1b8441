"""A GGUF file turned into an ordinary model folder: bf16 safetensors, config and tokenizer.

Every number in the file that changes what the model computes is either carried over or makes
the file be refused, so that a converted model is the one in the file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from narrows.errors import ModelError, UnsupportedModel, reason
from narrows.model.pretrained import quiet

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""Those whose conversion is tested; llama.cpp and transformers call them the same."""

SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Metadata below the architecture's name, and what transformers' configs call it."""

IMPLIED = (
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "tensor_data_layout",
    "vocab_size",
)
"""Metadata that is used otherwise, or that follows from the rest. Any more is refused."""

SPLIT_BY_TRANSFORMERS = (
    "deepseek-r1-qwen",
    "gpt-2",
    "llama-bpe",
    "llama-v3",
    "llama3",
    "qwen2",
    "tekken",
)
SPLIT_DIGITS = ("codeshell", "command-r", "refact", "smollm", "starcoder")
"""Names of ways to split text before byte-pair merging: those transformers knows, and those
that are GPT-2's after every digit was set apart."""

BEGIN_BY_DEFAULT = ("llama-bpe", "llama-v3", "llama3")
"""Those that put a first token before a text unless the file says otherwise."""


def convert(source: Path, target: Path) -> None:
    """Write the model in GGUF file ``source`` into folder ``target``.

    Raises ModelError if the file is damaged or holds what cannot be converted exactly,
    UnsupportedModel if the architecture is not known.
    """
    try:
        reader = gguf.GGUFReader(source)
    except Exception as error:
        raise ModelError(
            f"{source} is not a GGUF file, or is damaged or cut short: {reason(error)}"
        ) from error
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if field.types[0] != gguf.GGUFValueType.ARRAY
    }
    family = metadata.get("general.architecture")
    if family not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{source}: GGUF architecture {family!r} is not converted "
            f"(known: {', '.join(ARCHITECTURES)}); use the model's safetensors"
        )
    try:
        with quiet():
            _convert_model(reader, metadata, target)
            _convert_tokenizer(source, metadata, target)
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the disk's; transformers' have no number
            raise
        raise ModelError(
            f"cannot convert the GGUF file {source}: {reason(error)}; use the model's safetensors"
        ) from error


def _convert_model(reader: gguf.GGUFReader, metadata: dict[str, Any], target: Path) -> None:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    state = {}
    for name, _ in model.named_parameters():
        tensor = tensors.pop(names.get_name(name, (".weight", ".bias")), None)
        if tensor is None:
            raise ValueError(f"it lacks the weights of {name}")
        value = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        state[name] = _rows_in_order(name, value, config).to(torch.bfloat16)
    if tensors:
        raise ValueError(f"its tensor {min(tensors)} has no place in the architecture")
    model.load_state_dict(state, strict=False, assign=True)  # not strict: a tied head has none
    model.tie_weights()
    model.save_pretrained(target)


def _config(metadata: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """The transformers config the metadata describes."""
    family = metadata["general.architecture"]
    prefix = f"{family}."
    own = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    if unknown := set(own) - {*SETTINGS, *IMPLIED}:
        raise ValueError(f"its setting {prefix}{min(unknown)} is not known here")
    options = {ours: own[key] for key, ours in SETTINGS.items() if key in own}
    options.setdefault("num_key_value_heads", options["num_attention_heads"])
    options.setdefault("head_dim", options["hidden_size"] // options["num_attention_heads"])
    if own.get("rope.dimension_count", options["head_dim"]) != options["head_dim"]:
        raise ValueError("it turns only a part of each head (rope.dimension_count)")
    return AutoConfig.for_model(
        family,
        **options,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        rope_parameters={"rope_type": "default", "rope_theta": own.get("rope.freq_base", 1e4)},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        dtype=torch.bfloat16,
    )


def _rows_in_order(name: str, value: Tensor, config: Any) -> Tensor:
    """Undo llama.cpp's order of llama's query and key rows: it lays the two halves that rotate
    together side by side, transformers one after the other."""
    if config.model_type != "llama" or not ("q_proj" in name or "k_proj" in name):
        return value
    pairs = value.reshape(-1, config.head_dim // 2, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)


# ------------------------------------------------------------------------------- the tokenizer


def _convert_tokenizer(source: Path, metadata: dict[str, Any], target: Path) -> None:
    """Byte-pair vocabularies are called "gpt2" there, sentencepiece's "llama"."""
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"its kind of tokenizer, {kind!r}, is not known here")
    if kind == "llama" and not metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError("it reads text without a blank before it, which is not known here")
    if kind == "gpt2" and split not in (*SPLIT_BY_TRANSFORMERS, *SPLIT_DIGITS):
        raise ValueError(f"its way to split text, tokenizer.ggml.pre {split!r}, is not known here")
    with tempfile.TemporaryDirectory() as alone:
        # transformers would also read what lies beside the file, so it sees the file alone
        link = Path(alone) / "model.gguf"
        link.symlink_to(source.absolute())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=link.name)
    if kind == "gpt2" and split in SPLIT_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    default = kind == "llama" or split in BEGIN_BY_DEFAULT
    begin = metadata.get("tokenizer.ggml.add_bos_token", default)
    if begin and tokenizer.bos_token is not None:
        _begin_with(tokenizer.backend_tokenizer, tokenizer.bos_token)
    tokenizer.save_pretrained(target)


def _begin_with(tokenizer: Tokenizer, token: str) -> None:
    """Make the tokenizer put the special ``token`` before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )

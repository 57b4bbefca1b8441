"""A GGUF file turned into an ordinary model folder: bf16 safetensors, config and tokenizer.

transformers reads the tensors and undoes llama.cpp's layouts. What it would drop without a word
(context scaling, a tensor it has no place for, how text is split) is checked here, so that a
file is converted exactly or refused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from narrows.errors import ModelError, UnsupportedModel, reason
from narrows.model.pretrained import quiet

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""llama.cpp's names of the architectures whose conversion is tested."""

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

LLAMA3_SPLITS = ("llama-bpe", "llama-v3", "llama3")


def convert(source: Path, target: Path) -> None:
    """Write the model in GGUF file ``source`` into folder ``target``.

    Raises ModelError if the file is damaged or holds what cannot be converted exactly,
    UnsupportedModel if the architecture is not known.
    """
    try:
        with quiet(), tempfile.TemporaryDirectory() as alone:
            metadata, tensors = _read(source)
            _check(source, metadata)
            # transformers would also read what lies beside the file, so it sees the file alone
            link = Path(alone) / "model.gguf"
            link.symlink_to(source.absolute())
            _convert_model(link, target, metadata, tensors)
            _convert_tokenizer(link, target, metadata)
    except ModelError:
        raise
    except Exception as error:  # the readers raise whatever a damaged byte leads them to
        if isinstance(error, OSError) and error.errno:  # the disk's; transformers' have no number
            raise
        raise ModelError(f"cannot convert the GGUF file {source}: {reason(error)}") from error


def _read(source: Path) -> tuple[dict[str, Any], int]:
    """The file's short metadata and its number of tensors."""
    try:
        reader = GGUFReader(source)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(
            f"{source} is not a GGUF file, or is damaged or cut short: {reason(error)}"
        ) from error
    values = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.ggml.") or len(field.data) <= 1
    }
    return values, len(reader.tensors)


def _check(source: Path, metadata: dict[str, Any]) -> None:
    family = metadata.get("general.architecture")
    if family not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{source}: GGUF architecture {family!r} is not converted "
            f"(known: {', '.join(ARCHITECTURES)}); use the model's safetensors"
        )
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    for key, plain in (
        (f"{family}.rope.scaling.type", scaling == "none"),
        (f"{family}.attention.sliding_window", False),
        (f"{family}.expert_count", metadata.get(f"{family}.expert_count") == 0),
    ):
        if key in metadata and not plain:
            raise ModelError(
                f"{source} sets {key}, which cannot be converted; use the model's safetensors"
            )
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        split = metadata.get("tokenizer.ggml.pre")
        if split not in (*SPLIT_BY_TRANSFORMERS, *SPLIT_DIGITS):
            raise ModelError(
                f"{source} splits text in a way that is not known (tokenizer.ggml.pre = "
                f"{split!r}); use the model's safetensors"
            )


def _convert_model(source: Path, target: Path, metadata: dict[str, Any], tensors: int) -> None:
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    head_dim = metadata.get(f"{metadata['general.architecture']}.attention.key_length")
    if head_dim is not None:
        config.head_dim = head_dim
    loaded, report = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        config=config,
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    parameters = len(list(loaded.parameters()))
    if report["missing_keys"]:
        raise ValueError(f"it lacks the weights of {min(report['missing_keys'])}")
    if tensors != parameters:
        raise ValueError(
            f"it holds {tensors} tensors where its config has {parameters}; "
            "use the model's safetensors"
        )
    plain = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        plain.pop(key, None)
    # transformers will not save a model that came from a GGUF, though its weights are plain by
    # now; a fresh model that takes the weights over can be saved
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(config).from_dict(plain))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(target)


def _convert_tokenizer(source: Path, target: Path, metadata: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    split = metadata.get("tokenizer.ggml.pre")
    if split in SPLIT_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        first = metadata.get("tokenizer.ggml.add_bos_token", split in LLAMA3_SPLITS)
        if first and tokenizer.bos_token is not None:
            _begin_with(tokenizer.backend_tokenizer, tokenizer.bos_token)
    tokenizer.save_pretrained(target)


def _begin_with(tokenizer: Tokenizer, token: str) -> None:
    """Make the tokenizer put the special ``token`` before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )

"""Converted models on disk: ordinary model folders, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from narrows.errors import ConfigError, InputError, reason
from narrows.model.folder import TOKENIZERS
from narrows.model.pretrained import from_folder, quiet, weights_from_folder

BESIDE = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "merges.txt", "chat_template.jinja", "generation_config.json")  # fmt: skip
"""Files that a converted model takes over from its base."""


def load(folder: Path, *, dtype: torch.dtype | str = "auto") -> Any:
    """The transformers model in ``folder``, converted or not, for work on its weights. Raises
    ModelError."""
    config = from_folder(AutoConfig, folder)
    return weights_from_folder(
        AutoModelForCausalLM, folder, config=config, dtype=dtype, attn_implementation="sdpa"
    ).eval()


def check_place(out: Path) -> None:
    """Raises ConfigError unless ``write`` could make the folder ``out`` new."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; give a new folder")
    parent = out.absolute().parent
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"cannot write {out}: its folder is missing or not writable")


def write(model: Any, source: Path, out: Path) -> None:
    """Save ``model`` as folder ``out`` with the tokenizer of folder ``source``, beside its place
    and then renamed. Raises ConfigError if something is there, InputError if the disk refuses."""
    check_place(out)
    part = out.absolute().with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with quiet():
            model.save_pretrained(part)
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    except Exception as error:  # safetensors and transformers raise what they like
        raise InputError(f"cannot write {out}: {reason(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)

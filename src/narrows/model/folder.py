"""What a model folder must hold before anything tries to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from narrows.errors import ModelError, reason
from narrows.model import ctranslate2

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
FEATURES = "preprocessor_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_folder(folder: Path) -> None:
    """Raise ModelError unless ``folder`` holds a config, whole weights and a tokenizer (or, for
    what hears, a feature extractor).

    Weights are safetensors or a CTranslate2 model; their headers are read, not they.
    """
    if not (folder / "config.json").is_file():
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        hint = f"; to use its GGUF file, name {gguf}" if gguf else ""
        raise ModelError(f"{folder} has no config.json, so it is not a model folder{hint}")
    read_json(folder / "config.json")
    if ctranslate2.is_model(folder / ctranslate2.WEIGHTS):
        ctranslate2.variables(folder / ctranslate2.WEIGHTS)
        if next(folder.glob("vocabulary.*"), None) is None:
            raise ModelError(f"{folder} has no vocabulary.json, which a CTranslate2 model needs")
    else:
        for path, names in _weight_files(folder).items():
            _check_safetensors(path, names)
    if not any((folder / name).is_file() for name in (*TOKENIZERS, FEATURES)):
        raise ModelError(
            f"{folder} has no tokenizer (looked for {', '.join(TOKENIZERS)}); "
            "copy the tokenizer files of the model into it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"cannot read {path}: not a JSON object")
    return value


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Each weight file and the tensors an index says it holds (none said: an empty set)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: set()}
    if index.is_file():
        files: dict[Path, set[str]] = {}
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise ModelError(f"cannot read {index}: it has no weight_map")
        for tensor, name in placed.items():
            files.setdefault(folder / str(name), set()).add(tensor)
        return files
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise ModelError(
            f"{folder} has only pickled weights, which can run code when read; only safetensors "
            "and GGUF are read: save the model with save_pretrained first"
        )
    raise ModelError(f"{folder} has no model.safetensors and no model.safetensors.index.json")


def _check_safetensors(path: Path, names: set[str]) -> None:
    """Opening parses the header and compares it with the file's length."""
    if not path.is_file():
        raise ModelError(f"{path} is missing, though the index beside it names it")
    try:
        with safe_open(path, framework="numpy") as file:
            held = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short: {reason(error)}") from error
    if lacking := sorted(names - held):
        raise ModelError(f"{path} lacks tensor {lacking[0]!r}, which the index places there")

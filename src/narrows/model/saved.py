"""Small trained modules on disk: weights as safetensors beside a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from narrows.config import Settings
from narrows.errors import ConfigError, ModelError
from narrows.files import replacing

CONFIG = "config.json"

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound=Settings)


def save_module(module: nn.Module, config: Settings, folder: Path, weights: str) -> None:
    """Write the weights as bfloat16 to the file ``weights`` of ``folder``, and the config, each
    beside and then renamed. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        k: (v.bfloat16() if v.is_floating_point() else v).contiguous()
        for k, v in module.state_dict().items()
    }
    with replacing(folder / weights) as beside:
        save_file(kept, beside)
    with replacing(folder / CONFIG) as beside:
        beside.write_text(config.model_dump_json(indent=1) + "\n")


def load_config(folder: Path, config_type: type[C], name: str) -> C:
    """The config that ``save_module`` wrote; ``name`` is what errors call the module. Raises
    ModelError."""
    try:
        return config_type(**json.loads((folder / CONFIG).read_text()))
    except ConfigError as error:
        raise ModelError(f"{folder / CONFIG} is not a {name}'s: {error}") from None
    except Exception as error:
        raise ModelError(f"cannot read a {name} from {folder}: {error}") from None


def load_module(
    make: Callable[[C], M], config_type: type[C], folder: Path, weights: str, name: str
) -> M:
    """The module that ``save_module`` wrote, in float32; ``make`` builds it from its config,
    ``name`` is what errors call it.

    Raises ModelError if it is not there, not whole or not of its config, or ``make`` refuses that
    by a ConfigError.
    """
    config = load_config(folder, config_type, name)
    try:
        found = load_file(folder / weights)
    except Exception as error:
        raise ModelError(f"cannot read a {name} from {folder}: {error}") from None
    try:
        with torch.device("meta"):
            module = make(config)
    except ConfigError as error:
        raise ModelError(f"{folder}: {error}") from None
    expected = {k: v.shape for k, v in module.state_dict().items()}
    if {k: v.shape for k, v in found.items()} != expected:
        raise ModelError(f"the weights in {folder} do not belong to its {CONFIG}")
    wide = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    module.load_state_dict(wide, assign=True)
    return module

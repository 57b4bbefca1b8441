"""Small trained modules on disk: weights as safetensors beside a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from narrows.config import Settings
from narrows.errors import ConfigError, ModelError
from narrows.files import replacing

CONFIG = "config.json"
SCALE = ":scale"
"""Behind the name of a weight stored as codes: the name of their scales."""
LARGEST = 127
"""Of the codes."""

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound=Settings)


def save_module(
    module: nn.Module,
    config: Settings,
    folder: Path,
    weights: str,
    *,
    config_name: str = CONFIG,
    eight_bits: bool = False,
) -> None:
    """Write the weights to the file ``weights`` of ``folder``, and the config, each beside and then
    renamed: as bfloat16, or, with ``eight_bits``, those of two or more dimensions as int8 codes
    with a scale for each first index. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if eight_bits and value.ndim > 1 and value.is_floating_point():
            scale = value.float().flatten(1).abs().amax(1).clamp(min=1e-30) / LARGEST
            codes = (value.float().flatten(1) / scale[:, None]).round()
            kept[name] = codes.to(torch.int8).view(value.shape)
            kept[name + SCALE] = scale
        else:
            kept[name] = (value.bfloat16() if value.is_floating_point() else value).contiguous()
    with replacing(folder / weights) as beside:
        save_file(kept, beside)
    with replacing(folder / config_name) as beside:
        beside.write_text(config.model_dump_json(indent=1) + "\n")


def load_config(folder: Path, config_type: type[C], name: str, config_name: str = CONFIG) -> C:
    """The config that ``save_module`` wrote; ``name`` is what errors call the module. Raises
    ModelError."""
    try:
        return config_type(**json.loads((folder / config_name).read_text()))
    except ConfigError as error:
        raise ModelError(f"{folder / config_name} is not a {name}'s: {error}") from None
    except Exception as error:
        raise ModelError(f"cannot read a {name} from {folder}: {error}") from None


def load_module(
    make: Callable[[C], M],
    config_type: type[C],
    folder: Path,
    weights: str,
    name: str,
    *,
    config_name: str = CONFIG,
) -> M:
    """The module that ``save_module`` wrote, in float32; ``make`` builds it from its config,
    ``name`` is what errors call it.

    Raises ModelError if it is not there, not whole or not of its config, or ``make`` refuses that
    by a ConfigError.
    """
    config = load_config(folder, config_type, name, config_name)
    try:
        found = load_file(folder / weights)
    except Exception as error:
        raise ModelError(f"cannot read a {name} from {folder}: {error}") from None
    try:
        with torch.device("meta"):
            module = make(config)
    except ConfigError as error:
        raise ModelError(f"{folder}: {error}") from None
    scales = {k.removesuffix(SCALE): found.pop(k) for k in list(found) if k.endswith(SCALE)}
    expected = {k: v.shape for k, v in module.state_dict().items()}
    fitting = {k: expected[k][:1] for k in scales if k in expected}
    if {k: v.shape for k, v in found.items()} != expected or fitting != {
        k: v.shape for k, v in scales.items()
    }:
        raise ModelError(f"the weights in {folder} do not belong to its {config_name}")
    wide = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    for name, scale in scales.items():
        wide[name] = (found[name].float().flatten(1) * scale[:, None]).view(found[name].shape)
    module.load_state_dict(wide, assign=True)
    return module

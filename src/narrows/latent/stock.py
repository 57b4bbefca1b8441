"""A converted model as a stock checkpoint, for engines that know nothing of us.

Where key and value heads are of one size, a converted model differs from its family's own only in
its frequencies, and those are written as the factors of a ``longrope`` scaling already. So any
engine that knows the family, ``head_dim`` and ``longrope`` can serve it: transformers and vLLM do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from narrows.errors import ConfigError
from narrows.latent import checkpoint
from narrows.model.adapter import family_of
from narrows.model.latent import is_converted, value_head_dim


def to_stock(model: Any) -> Any:
    """The stock model of the family of a converted one, which shares its weights. Raises
    ConfigError if it was not converted, or its value heads differ in size from its key heads."""
    config = model.config
    if not is_converted(config):
        raise ConfigError("the model is not converted, so it is a stock checkpoint as it is")
    narrow = value_head_dim(config)
    if narrow != config.head_dim:
        raise ConfigError(
            f"keys have {config.head_dim} numbers a head and values {narrow}; only where both are "
            "equal is there a stock model of them"
        )
    told = config.to_dict()
    for name in ("model_type", "architectures", "value_head_dim", "kv_latent"):
        told.pop(name, None)
    stock = CONFIG_MAPPING[family_of(config)](**told)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(stock)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    made.base_model.rotary_emb = type(model.base_model.rotary_emb)(stock)
    return made.eval()


def export_stock(converted: Path, out: Path) -> Any:
    """Write the stock model of the converted one in folder ``converted`` as folder ``out``, and
    return it. Raises as ``to_stock``, ``checkpoint.load`` and ``checkpoint.write``."""
    checkpoint.check_place(out)
    model = to_stock(checkpoint.load(converted))
    checkpoint.write(model, converted, out)
    return model

"""Tiny converted models, and the text they were converted on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from narrows.latent.convert import LatentOptions, convert
from narrows.latent.statistics import LayerStatistics, measure
from narrows.model import attention
from narrows.model.flat import FlatModel
from tiny import pair, prompts

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SUBSET: dict[str, Any] = {"pairs": "stride", "rope": "subset", "values": "stride", "gain": "none"}
"""A plain part of the base model."""


def base(family: str, **changes: object) -> Any:
    """A tiny stock model with heads of 32 numbers, with eager attention."""
    return pair(family, **{"head_dim": 32, "sliding_window": None, **changes})[1]


@functools.cache
def statistics(family: str) -> list[LayerStatistics]:
    return measure(base(family), [p for p in prompts(8, seed=5) if len(p) > 8])


def converted(family: str, qk: int, vo: int, **options: Any) -> Any:
    """``base(family)`` with heads of ``qk`` and ``vo`` numbers, with eager attention."""
    if family == "qwen3":
        options.setdefault("gain", "keep")
    made = convert(base(family), LatentOptions(qk=qk, vo=vo, **options), statistics(family))
    made.set_attn_implementation("eager")
    return made


def flat(stock: Any) -> FlatModel:
    """The same weights as a FlatModel."""
    attention.install()
    config = type(stock.config).from_dict(stock.config.to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    model.load_state_dict(stock.state_dict())
    return FlatModel(model, None, "tiny-latent")


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Next-token logits ``[n, vocab]`` by transformers."""
    with torch.inference_mode():
        scores: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return scores

"""Rotary frequencies of a smaller head, as places in the base model's own table.

Pair ``i`` of a head of ``D`` numbers turns by ``theta ** (-2i / D)`` a token, so the exponents of
the frequency-aware set (paper section 3.2; its formula 11 is misprinted, sheet section 4.2) are
places, often between two entries, in the table of the base's ``delta = d_h / 2`` frequencies.
Reading them off the table, not off ``theta``, folds in once whatever scaling the base has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrows.errors import ConfigError


def frequency_aware_places(size: int, pairs: int) -> list[float]:
    """Where in a table of ``pairs`` frequencies the ``size / 2`` frequency-aware ones of a head of
    ``size`` numbers lie: the fastest quarter left out, the slowest sampled twice as densely.
    Raises ConfigError unless ``size`` is a multiple of 4."""
    if size % 4:
        raise ConfigError(f"frequency-aware RoPE needs a key size divisible by 4, not {size}")
    quarter = size // 4
    fast = [quarter + 2 * i for i in range(quarter)]
    slow = [2 * quarter + i for i in range(quarter, 2 * quarter)]
    return [exponent * pairs / size for exponent in fast + slow]


def read_off(table: Tensor, places: list[float]) -> Tensor:
    """Frequencies float64 ``[len(places)]`` at ``places`` of a ``table`` ``[pairs]``; between two
    entries, and behind the last, as a power law goes on (exact for an unscaled table)."""
    logs = table.double().log()
    at = torch.tensor(places, dtype=torch.float64)
    low = at.floor().clamp(max=len(table) - 2).long()
    return torch.lerp(logs[low], logs[low + 1], at - low).exp()


def rope_parameters(config: Any, table: Tensor, scale: float) -> dict[str, Any]:
    """``rope_parameters`` by which transformers and vLLM make the frequencies ``table`` ``[d / 2]``
    of a head of ``d`` numbers: of the type ``longrope``, whose factors divide the plain ones.
    ``scale`` multiplies cosines and sines, as the base's scaling has it."""
    theta = float(config.rope_parameters["rope_theta"])
    plain = theta ** (-torch.arange(len(table), dtype=torch.float64) / len(table))
    factors = (plain / table.double()).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": scale,
        "factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }

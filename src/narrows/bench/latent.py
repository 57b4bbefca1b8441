"""Converted models beside their base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from narrows.bench.cache_quality import compare
from narrows.cache.dense import DensePolicy
from narrows.model.flat import FlatModel

ROWS = 256
"""Rows of logits held at once."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a conversion costs and saves on some text: cache bytes a token of base and converted
    model in the dtype they run in, mean divergence from the base in nats a token, perplexities."""

    base_bytes: int
    bytes: int
    kl: float
    base_perplexity: float
    perplexity: float
    tokens: int

    def __str__(self) -> str:
        share = 100 * self.bytes / self.base_bytes
        return (
            f"{self.bytes:,} of {self.base_bytes:,} cache bytes a token ({share:.1f} %); over "
            f"{self.tokens:,} tokens {self.kl:.4f} nats from the base, perplexity "
            f"{self.perplexity:.2f} against {self.base_perplexity:.2f}"
        )


@torch.inference_mode()
def compare_models(base: FlatModel, made: FlatModel, windows: Sequence[Sequence[int]]) -> Cost:
    """Read ``windows`` of token ids with both."""
    kl, nll, base_nll, count = 0.0, 0.0, 0.0, 0
    for window in windows:
        states = [m.read(window, DensePolicy().build(m.shape))[:-1] for m in (base, made)]
        truth = torch.tensor(list(window[1:]), device=states[0].device)
        for rows in torch.split(torch.arange(len(truth)), ROWS):
            wanted, given = (m.logits(s[rows]) for m, s in zip((base, made), states, strict=True))
            divergence, _, surprisal = compare(wanted, given, truth[rows])
            kl += float(divergence.sum())
            nll += float(surprisal.sum())
            base_nll += float(compare(wanted, wanted, truth[rows])[2].sum())
            count += len(rows)
    return Cost(
        base_bytes=token_bytes(base),
        bytes=token_bytes(made),
        kl=kl / count,
        base_perplexity=math.exp(base_nll / count),
        perplexity=math.exp(nll / count),
        tokens=count,
    )


def token_bytes(model: FlatModel) -> int:
    """Bytes of one token's keys and values in all layers, in the model's dtype."""
    shape = model.shape
    return sum(layer.numbers for layer in shape.layers) * shape.dtype.itemsize

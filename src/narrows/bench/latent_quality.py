"""How far a converted model is from its base: whole windows of text, each read in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from narrows.bench.cache_quality import Quality, Window, compare
from narrows.bench.cache_subjects import Ours
from narrows.bench.latent_models import Candidate, token_bytes
from narrows.bench.report import Row
from narrows.cache.dense import DensePolicy
from narrows.model.flat import FlatModel

ROWS = 16
"""Rows of logits compared at once: their float64 copies are used again before they leave the
processor's caches."""


class OnePass(Quality):
    """Quality of models with dense caches: one pass over a window predicts what reading it token
    by token does. Windows have no prefix; ``base`` is the yardstick."""

    def __init__(self, subjects: Sequence[Ours], base: Ours) -> None:
        super().__init__(subjects, {base.engine: base})
        self.models = {s.method: s.model for s in subjects}
        self.base = base

    @torch.inference_mode()
    def read(self, windows: Sequence[Window], advance: Callable[[], None] = lambda: None) -> None:
        """See Quality; ``advance`` is called after each window."""
        for window in windows:
            ids = window.decoded
            states = {
                name: model.read(ids, DensePolicy().build(model.shape))[:-1]
                for name, model in self.models.items()
            }
            truth = torch.tensor(ids[1:], device=self.base.model.shape.device)
            columns: dict[str, list[np.ndarray]] = {name: [] for name in states}
            for rows in torch.split(torch.arange(len(truth)), ROWS):
                wanted = self.base.model.logits(states[self.base.method][rows])
                for name, model in self.models.items():
                    same = name == self.base.method
                    given = wanted if same else model.logits(states[name][rows])
                    measured = torch.stack(compare(wanted, given, truth[rows]))
                    columns[name].append(measured.cpu().numpy())
            for name, parts in columns.items():
                found = self.found[name]
                lines = np.concatenate(parts, 1)
                for values, line in zip((found.kl, found.agrees, found.nll), lines, strict=True):
                    values.append(line[None])
                found.held.append(token_bytes(self.models[name]) * np.arange(1.0, len(ids))[None])
            advance()


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


def compare_models(base: FlatModel, made: FlatModel, windows: Sequence[Sequence[int]]) -> Cost:
    """Read ``windows`` of token ids, all of one length, with both."""
    before, after = Candidate(base, "base", base), Candidate(made, "made", base)
    quality = OnePass([before, after], before)
    quality.read([Window([], list(window)) for window in windows])
    kl = quality.found["made"].pooled("kl")[0]
    nll, base_nll = (quality.found[name].pooled("nll")[0] for name in ("made", "base"))
    return Cost(
        base_bytes=token_bytes(base),
        bytes=token_bytes(made),
        kl=float(np.mean(kl)),
        base_perplexity=math.exp(np.mean(base_nll)),
        perplexity=math.exp(np.mean(nll)),
        tokens=len(kl),
    )


def ratio_rows(rows: Sequence[Row]) -> list[Row]:
    """For each row of a difference in nats a token, one of the ratio of the perplexities."""
    return [
        {
            **r,
            "metric": "perplexity_ratio",
            "unit": "1",
            "value": math.exp(r["value"]),
            "interval": [math.exp(end) for end in r["interval"]],
        }
        for r in rows
        if r["metric"] == "nll_difference"
    ]

"""How much of a cache is redundant, layer by layer: what SpindleKV rests on (arXiv 2507.06517,
section 3 of the sheet).

Shallow layers are said to hold vectors that are alike, deep ones tokens that nobody attends to.
Both are measured here for a model and a text, since they decide whether the method can pay off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.cache.codebook import Codebook, Rule
from narrows.cache.dense import DenseLayer
from narrows.cache.evict_layer import EvictLayer
from narrows.cache.scores import attention
from narrows.cache.stack import parse_cache
from narrows.errors import ConfigError, InputError, UnsupportedModel
from narrows.model.flat import FlatModel
from narrows.ops.cover import likeness_graph
from narrows.ops.rotary import turn_back

CHUNK = 512
"""Tokens read in one forward pass."""
WINDOW = 32
"""Newest queries whose attention counts."""
TOP = 0.1
"""Share of the tokens whose attention is told."""


@dataclass(frozen=True, slots=True)
class LayerRedundancy:
    """One full-attention layer, means over KV heads (``attention``: query heads).

    ``keys``, ``keys_rotated`` and ``values`` are the shares of token pairs whose cosine passes the
    threshold; ``key_entries`` and ``value_entries`` what a codebook would store of them, as a
    share of the tokens; ``keys_across`` and ``values_across`` the greatest cosine of vectors of
    different KV heads (0: none is above it, or there is one head), which says whether heads could
    share entries; ``attention`` the share of the newest queries' attention that goes to the tenth
    of the tokens that gets most of it.
    """

    layer: int
    keys: float
    keys_rotated: float
    values: float
    key_entries: float
    value_entries: float
    keys_across: float
    values_across: float
    attention: float


MEASURES = tuple(LayerRedundancy.__dataclass_fields__)[1:]


@dataclass(frozen=True, slots=True)
class RedundancyReport:
    """The layers, and how they were measured."""

    model: str
    tokens: int
    theta_k: float
    theta_v: float
    layers: tuple[LayerRedundancy, ...]


def measure(
    model: FlatModel, ids: Sequence[int], *, theta_k: float = 0.98, theta_v: float = 0.95
) -> RedundancyReport:
    """Read the tokens ``ids`` and look at every full-attention layer.

    Raises InputError for fewer than two tokens or more than the model reads, ConfigError for
    thresholds that are no cosines, UnsupportedModel for a model of sliding-window layers only.
    """
    for name, theta in (("theta_k", theta_k), ("theta_v", theta_v)):
        if not -1 < theta <= 1:
            raise ConfigError(f"{name} must lie above -1 and not above 1 (given: {theta})")
    if not 2 <= len(ids) <= model.shape.max_tokens:
        raise InputError(
            f"the text has {len(ids)} tokens; give between 2 and {model.shape.max_tokens}"
        )
    if all(layer.window is not None for layer in model.shape.layers):
        raise UnsupportedModel(f"{model.name} has sliding-window layers only")
    caches = parse_cache(f"evict:window={WINDOW}").build(model.shape)
    for start in range(0, len(ids), CHUNK):
        model.read(ids[start : start + CHUNK], caches)
    found = tuple(
        _layer(model, number, cache, theta_k, theta_v)
        for number, cache in enumerate(caches)
        if isinstance(cache, EvictLayer)
    )
    return RedundancyReport(model.name, len(ids), theta_k, theta_v, found)


def _layer(
    model: FlatModel, number: int, cache: EvictLayer, theta_k: float, theta_v: float
) -> LayerRedundancy:
    dense, scorer = cache.prompt, cache.scorer
    assert isinstance(dense, DenseLayer)
    tokens = dense.held
    places = torch.arange(tokens, device=dense.k.device)
    rotated = dense.k[:, :tokens].float()
    plain = turn_back(rotated.transpose(0, 1), *model.rotary(places)).transpose(0, 1)
    values = dense.v[:, :tokens].float()
    q: Tensor = scorer.q  # type: ignore[union-attr]
    paid = attention(q, dense.k[:, :tokens], scorer.scale).mean(1)  # type: ignore[union-attr]
    most = paid.topk(max(1, round(TOP * tokens)), dim=-1).values.sum(-1) / paid.sum(-1)
    return LayerRedundancy(
        number,
        keys=_pairs(plain, theta_k),
        keys_rotated=_pairs(rotated, theta_k),
        values=_pairs(values, theta_v),
        key_entries=_entries(plain, theta_k),
        value_entries=_entries(values, theta_v),
        keys_across=_across(plain),
        values_across=_across(values),
        attention=float(most.mean()),
    )


def _pairs(x: Tensor, threshold: float) -> float:
    """Share of the pairs of different tokens that are alike, of ``[heads, n, dim]``."""
    n = x.shape[1]
    alike = [int(likeness_graph(head, threshold).sum()) - n for head in x]
    return sum(alike) / (len(alike) * n * (n - 1))


def _entries(x: Tensor, threshold: float) -> float:
    """Entries of a codebook over tokens, mean over heads."""
    shares = []
    for head in x:
        book = Codebook(Rule(threshold, block=len(head)), None)
        book.extend(head, torch.arange(len(head), device=head.device))
        assert book.entries is not None
        shares.append(len(book.entries) / len(head))
    return sum(shares) / len(shares)


def _across(x: Tensor) -> float:
    """The greatest cosine of vectors of different heads of ``[heads, n, dim]``, not below 0."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    most = 0.0
    for head in range(1, len(unit)):
        for start in range(0, unit.shape[1], CHUNK):
            rows = unit[head, start : start + CHUNK]
            most = max(most, float((rows @ unit[:head].transpose(1, 2)).max()))
    return min(1.0, most)  # rounding may go beyond

"""How alike the keys and values of neighbouring layers are, measured against chance.

Cross-layer sharing lets a layer read its neighbour's codes, which pays only where the two vary
together. Each measure is given twice: as the text has it, and with the upper layer's tokens in a
random order, which is what layers that know nothing of each other give. The agreement the XQuant
paper counts, codes that differ by at most 1, is about 0.82 by chance alone (design sheet 5.1).
``choose_shared`` turns the report into a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.cache.dense import DensePolicy
from narrows.cache.quantized import PLANS
from narrows.errors import BudgetError, ConfigError, InputError, NumericalError, UnsupportedModel
from narrows.model.flat import FlatModel
from narrows.ops.quant import BITS, key_groups, quantise, value_groups

TENSORS = ("keys", "values")
CHUNK = 512
"""Tokens read in one forward pass."""

Pair = tuple[int, int]
"""Numbers of two neighbouring full-attention layers, the lower first."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """Measures of one pair, one number a KV head in each.

    ``near`` is the share of codes that differ by at most 1, ``top`` that of codes with the same
    top bit (with which one-bit codes agree but for ties). ``codes`` and ``plain`` are correlations
    of the codes and of the tensors themselves, taken within quantisation groups, since each layer
    keeps its own scale and zero. ``explained`` is the share of the upper layer's variance within
    groups that a least-squares fit to the lower layer's codes gives back; storing means alone
    gives 0.
    """

    near: tuple[float, ...]
    top: tuple[float, ...]
    codes: tuple[float, ...]
    plain: tuple[float, ...]
    explained: tuple[float, ...]


MEASURES = tuple(Likeness.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class PairLikeness:
    """One pair and one tensor ("keys" or "values"): in the ``text``, and by ``chance``."""

    tensor: str
    layers: Pair
    text: Likeness
    chance: Likeness


@dataclass(frozen=True, slots=True)
class SimilarityReport:
    """``layers`` are all full-attention layers; ``pairs`` those of their neighbours that have the
    same heads and head size. The rest is how it was measured."""

    model: str
    tokens: int
    bits: int
    group: int
    value_group: int
    seed: int
    layers: tuple[int, ...]
    pairs: tuple[PairLikeness, ...]


def compare(lower: Tensor, upper: Tensor, bits: int) -> Likeness:
    """Likeness of two tensors ``[heads, groups..., size]`` that are quantised along the last axis,
    with ``bits`` bits and min-max range."""
    a, b = quantise(lower, bits).codes, quantise(upper, bits).codes
    apart = (a.to(torch.int16) - b.to(torch.int16)).abs()
    same = (a >> (bits - 1)) == (b >> (bits - 1))
    x, y, fit = _centred(a), _centred(upper), _centred(lower)
    return Likeness(
        near=_per_head(apart <= 1),
        top=_per_head(same),
        codes=_correlation(x, _centred(b)),
        plain=_correlation(fit, y),
        explained=_explained(x, y),
    )


def _per_head(hit: Tensor) -> tuple[float, ...]:
    return tuple(hit.flatten(1).double().mean(1).tolist())


def _centred(x: Tensor) -> Tensor:
    """float64, less the mean of each group."""
    x = x.double()
    return x - x.mean(-1, keepdim=True)


def _correlation(x: Tensor, y: Tensor) -> tuple[float, ...]:
    """Of centred ``x`` and ``y``, pooled over a head's groups; 0 where one does not vary."""
    x, y = x.flatten(1), y.flatten(1)
    size = (x.square().sum(1) * y.square().sum(1)).sqrt()
    product = (x * y).sum(1)
    return tuple(torch.where(size > 0, product / size.clamp_min(1e-300), 0.0).tolist())


def _explained(x: Tensor, y: Tensor) -> tuple[float, ...]:
    """Share of y's variance that a line in ``x`` explains, a line a group."""
    variance = x.square().sum(-1)
    gained = (x * y).sum(-1).square() / variance.clamp_min(1e-300)
    gained = torch.where(variance > 0, gained, 0.0).flatten(1).sum(1)
    total = y.square().flatten(1).sum(1)
    return tuple(torch.where(total > 0, gained / total.clamp_min(1e-300), 0.0).tolist())


def measure(
    model: FlatModel,
    ids: Sequence[int],
    *,
    bits: int = 2,
    group: int = 128,
    value_group: int = 64,
    seed: int = 0,
) -> SimilarityReport:
    """Read the tokens ``ids`` and compare every two neighbouring full-attention layers.

    ``bits``, ``group`` (tokens of a key group) and ``value_group`` (channels, at most the head
    size) are the quantiser's. Tokens after the last whole group are left out. ``seed`` is of the
    random order. Raises InputError for fewer tokens than two groups or more than the model reads,
    ConfigError for sizes that do not fit, UnsupportedModel for a model without such a pair,
    NumericalError if a layer's keys or values are not finite.
    """
    if bits not in BITS:
        raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))} (given: {bits})")
    if group < 2 or value_group < 2:
        raise ConfigError("group and value_group must be at least 2")
    if len(ids) < 2 * group:
        raise InputError(
            f"the text has {len(ids)} tokens; to compare layers takes two groups, {2 * group}"
        )
    if len(ids) > model.shape.max_tokens:
        raise InputError(f"{len(ids)} tokens are more than {model.name} reads; give fewer")
    shapes = model.shape.layers
    layers = tuple(i for i, shape in enumerate(shapes) if shape.window is None)
    pairs = [p for p in pairwise(layers) if shapes[p[0]] == shapes[p[1]]]
    if not pairs:
        raise UnsupportedModel(
            f"{model.name} has no two neighbouring full-attention layers of one size to compare"
        )
    tokens = len(ids) // group * group
    stored = _read(model, list(ids[:tokens]), layers)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    found = []
    for what, tensor in enumerate(TENSORS):
        for pair in pairs:
            lower, upper = (stored[i][what] for i in pair)
            cut = _cutter(tensor, group, value_group, upper.shape[-1])
            mixed = upper[:, order.to(upper.device)]
            found.append(
                PairLikeness(
                    tensor,
                    pair,
                    text=compare(cut(lower), cut(upper), bits),
                    chance=compare(cut(lower), cut(mixed), bits),
                )
            )
    return SimilarityReport(
        model.name, tokens, bits, group, value_group, seed, layers, tuple(found)
    )


def _cutter(tensor: str, group: int, value_group: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Cuts ``[heads, tokens, dim]`` into groups along a new last axis."""
    if tensor == "keys":
        return lambda x: key_groups(x.contiguous(), group)
    size = min(value_group, dim)
    if dim % size:
        raise ConfigError(f"value_group {size} does not divide the head size {dim}")
    return lambda x: value_groups(x, size)


def _read(
    model: FlatModel, ids: list[int], layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values ``[kv_heads, tokens, dim]`` of the ``layers``."""
    caches = DensePolicy().build(model.shape)
    for start in range(0, len(ids), CHUNK):
        model.read(ids[start : start + CHUNK], caches)
    stored = {}
    for i in layers:
        k, v = (x.transpose(0, 1) for x in caches[i].materialize())
        for name, x in zip(TENSORS, (k, v), strict=True):
            if not bool(torch.isfinite(x).all()):
                raise NumericalError(f"{name} of layer {i} of {model.name} are not finite")
        stored[i] = k, v
    return stored


# ----------------------------------------------------------------------------------- what to share


def beyond_chance(pair: PairLikeness) -> float:
    """Share of the upper layer's variance that the lower layer's codes explain, less what they
    explain of its tokens in a random order; mean over heads. Near 0, sharing is worth no more
    than storing means."""
    return fmean(pair.text.explained) - fmean(pair.chance.explained)


class Shared(NamedTuple):
    """Pairs whose upper layer is to read the lower layer's codes, and the nominal bits a code that
    the plan then has (design sheet 7.1)."""

    keys: list[Pair]
    values: list[Pair]
    nominal: float


def choose_shared(
    report: SimilarityReport,
    *,
    nominal: float,
    key_bits: Sequence[int],
    value_bits: Sequence[int],
    tensors: Sequence[str] = ("values",),
) -> Shared:
    """The pairs to share so that the plan has at most ``nominal`` bits a code, at the least loss.

    ``key_bits`` and ``value_bits`` are the widths without sharing, one a full-attention layer.
    A pair loses what its lower layer's codes do not explain of its upper layer, and saves the
    upper layer's bits; a layer is in one pair at most, and the pair has one width. Among all such
    choices from ``tensors`` the one with the least summed loss is found exactly. Keys are left
    alone unless asked for: sharing them is the riskier half (sheet 13.18), and the losses of keys
    and values are not of one kind. Where no pair is alike (``beyond_chance``) the choice is as
    good as any other.

    Raises BudgetError if sharing cannot save enough, ConfigError for widths or tensors that do
    not fit the report.
    """
    widths = {"keys": list(key_bits), "values": list(value_bits)}
    count = len(report.layers)
    if any(len(bits) != count for bits in widths.values()):
        raise ConfigError(f"the report has {count} full-attention layers; give as many widths")
    if not set(tensors) <= set(TENSORS):
        raise ConfigError(f"tensors to share are {' and '.join(TENSORS)} (given: {tensors})")
    whole = sum(map(sum, widths.values()))
    need = max(0, whole - math.floor(2 * count * nominal + 1e-9))
    best: dict[int, _Choice] = {0: (0.0, ())}
    for tensor in TENSORS:
        if tensor in tensors:
            best = _merge(best, _frontier(report, tensor, widths[tensor]))
    enough = [saved for saved in best if saved >= need]
    if not enough:
        least = (whole - max(best)) / (2 * count)
        raise BudgetError(
            f"sharing {' and '.join(tensors)} reaches {least:.4g} nominal bits at best, not "
            f"{nominal:.4g}; lower the widths or share more"
        )
    saved = min(enough, key=lambda s: (best[s][0], s))
    chosen = best[saved][1]
    return Shared(
        keys=[pair for tensor, pair in chosen if tensor == "keys"],
        values=[pair for tensor, pair in chosen if tensor == "values"],
        nominal=(whole - saved) / (2 * count),
    )


def propose(report: SimilarityReport, tensors: Sequence[str] = ("values",)) -> str:
    """The spec of ``xquant`` with its own widths and nominal bits, that shares what the report
    finds most alike instead of every pair of the upper half, with least-squares borrowers."""
    count = len(report.layers)
    own = PLANS["xquant"](count)
    widths = {
        name: [2 if i < own[f"{name}_hi"] else 1 for i in range(count)] for name in ("key", "value")
    }
    whole = sum(map(sum, widths.values()))
    saved = len(range(own["value_share_from"] | 1, count, 2))  # one bit each
    shared = choose_shared(
        report,
        nominal=(whole - saved) / (2 * count),
        key_bits=widths["key"],
        value_bits=widths["value"],
        tensors=tensors,
    )
    place = {layer: i for i, layer in enumerate(report.layers)}
    options = ["borrow=lsq"]
    for name, pairs in (("key", shared.keys), ("value", shared.values)):
        uppers = sorted(place[upper] for _, upper in pairs)
        if uppers:
            options.append(f"{name}_pairs={'+'.join(map(str, uppers))}")
        elif name == "value":
            options.append(f"value_share_from={count}")
    return f"xquant:{','.join(options)}"


_Choice = tuple[float, tuple[tuple[str, Pair], ...]]
"""Summed loss, and the pairs that cause it."""


def _frontier(report: SimilarityReport, tensor: str, bits: Sequence[int]) -> dict[int, _Choice]:
    """For every number of bits that disjoint pairs of ``tensor`` can save, the least loss."""
    place = {layer: i for i, layer in enumerate(report.layers)}
    loss = {}
    for pair in report.pairs:
        i = place[pair.layers[1]]
        if pair.tensor == tensor and bits[i] == bits[i - 1]:
            loss[i] = (1.0 - fmean(pair.text.explained), (tensor, pair.layers))
    # before, now: the best over the layers below the previous one, and below this one.
    before: dict[int, _Choice] = {0: (0.0, ())}
    now = dict(before)
    for i in range(len(report.layers)):
        step = dict(now)
        if i in loss:
            lost, pair_of = loss[i]
            step = _least(
                step, {s + bits[i]: (c[0] + lost, (*c[1], pair_of)) for s, c in before.items()}
            )
        before, now = now, step
    return now


def _least(a: dict[int, _Choice], b: dict[int, _Choice]) -> dict[int, _Choice]:
    return {s: min(x for x in (a.get(s), b.get(s)) if x is not None) for s in {*a, *b}}


def _merge(a: dict[int, _Choice], b: dict[int, _Choice]) -> dict[int, _Choice]:
    out: dict[int, _Choice] = {}
    for s, (x, first) in a.items():
        for t, (y, second) in b.items():
            out = _least(out, {s + t: (x + y, first + second)})
    return out

"""Which layer stores how many bits of its keys and values, and whose codes it reads.

The options of the quantised policies, the plan they make for a model, and what that plan costs in
closed form (design sheet sections 6 and 7). Layers are counted within the list of full-attention
layers; sliding-window layers stay dense and take no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from narrows.config import Settings
from narrows.contracts import LayerShape, ModelShape
from narrows.errors import ConfigError
from narrows.ops.quant import BITS, LANES, QUAD, Fit

Meta = Literal["fp16", "bf16", "fp32", "int8", "int4"]
META_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SECOND_LEVEL = {"int8": 8, "int4": 4}
"""Bits of scale and zero that are themselves coded, a block at a time."""

Count = Annotated[int, Field(ge=0)]
Pairs = Annotated[str, Field(pattern=r"^\d+(\+\d+)*$")]
Run = Annotated[str, Field(pattern=r"^\d+-\d+$")]
Eta = Annotated[float, Field(ge=0.0, le=0.5)]


class QuantOptions(Settings):
    """Options of the quantised caches.

    ``bits`` are those of keys below layer ``key_hi`` and values below ``value_hi``; later layers
    have ``lo_bits``; ``key_at`` (``value_at``), such as "15-19", says instead which run of layers
    has ``bits``, all others ``lo_bits``. From ``key_share_from`` (``value_share_from``) on odd
    layers store no codes and read those of the layer before them; ``key_pairs`` (``value_pairs``),
    such as "17+20", names the layers that do instead. None stands for the policy's own plan.
    ``eta1`` and ``eta2`` calibrate codes of 1 and 2 bits. ``borrow`` is how a borrower fits its own
    scale and zero to codes that are not its own. ``group`` counts tokens (keys), ``value_group``
    channels. The newest ``residual`` tokens and the first ``sink`` stay dense. ``fold`` "token"
    quantises values one by one as they leave the residual (the papers' rule), "block" whole blocks
    of ``residual``, as keys always are. ``hold`` tokens can be rolled back exactly: the originals
    of what they push into the codes are kept beside them. ``key_meta`` and ``value_meta`` are the
    types of scale and zero; int8 and int4 are coded themselves, against a minimum and a step a
    block.
    """

    bits: int = 2
    lo_bits: int = 1
    key_hi: Count | None = None
    value_hi: Count | None = None
    key_at: Run | None = None
    value_at: Run | None = None
    key_share_from: Count | None = None
    value_share_from: Count | None = None
    key_pairs: Pairs | None = None
    value_pairs: Pairs | None = None
    group: int = 128
    value_group: int = 64
    residual: int = 128
    sink: Count = 0
    eta1: Eta = 0.0
    eta2: Eta = 0.0
    borrow: Fit = "minmax"
    key_meta: Meta = "fp16"
    value_meta: Meta = "fp16"
    fold: Literal["token", "block"] = "token"
    hold: Count = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("bits", "lo_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(f"{name} must be one of {', '.join(map(str, BITS))}")
        if self.group < LANES or self.group % LANES:
            raise ValueError(f"group must be a multiple of {LANES}")
        if self.residual < self.group or self.residual % self.group:
            raise ValueError("residual must be a multiple of group")
        if self.value_group < 1:
            raise ValueError("value_group must be at least 1")
        if self.value_meta in SECOND_LEVEL and self.fold == "token":
            raise ValueError(f"value_meta={self.value_meta} needs fold=block")
        return self

    def eta(self, bits: int) -> float:
        """How far the outermost levels of codes of ``bits`` bits are drawn in."""
        return {1: self.eta1, 2: self.eta2}.get(bits, 0.0)


@dataclass(frozen=True, slots=True)
class Side:
    """Keys or values of one layer: ``bits`` of the codes it reads, and ``owner``, the place in the
    model of the layer that stores them (None: its own)."""

    bits: int
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One full-attention layer; ``place`` is its number in the model."""

    place: int
    key: Side
    value: Side


def make_plan(options: QuantOptions, shape: ModelShape) -> list[LayerPlan]:
    """The plan of every full-attention layer. Raises ConfigError for one that is not legal: a
    pair across a change of width or of shape, or sizes that the packing cannot take."""
    places = [i for i, layer in enumerate(shape.layers) if layer.window is None]
    for place in places:
        _check_sizes(options, place, shape.layers[place])
    sides = []
    for name, below, run, first, pairs in (
        ("keys", options.key_hi, options.key_at, options.key_share_from, options.key_pairs),
        (
            "values",
            options.value_hi,
            options.value_at,
            options.value_share_from,
            options.value_pairs,
        ),
    ):
        high = _high(name, len(places), below, run)
        bits = [options.bits if i in high else options.lo_bits for i in range(len(places))]
        borrowers = _borrowers(name, len(places), first, pairs)
        for i in borrowers:
            _check_pair(name, shape, places[i - 1], places[i], bits[i - 1], bits[i])
        sides.append(
            [Side(b, places[i - 1] if i in borrowers else None) for i, b in enumerate(bits)]
        )
    return [LayerPlan(*x) for x in zip(places, *sides, strict=True)]


def _high(name: str, count: int, below: int | None, run: str | None) -> range:
    """The full-attention layers whose codes have ``bits``."""
    if run is None:
        return range(count if below is None else below)
    first, last = map(int, run.split("-"))
    if not first <= last < count:
        raise ConfigError(
            f"{name} of layers {run} cannot have codes of their own: the model has full-attention "
            f"layers 0 to {count - 1}; give the first and the last, such as 0-{count - 1}"
        )
    return range(first, last + 1)


def _borrowers(name: str, count: int, first: int | None, pairs: str | None) -> set[int]:
    """The full-attention layers that read the codes of the one before them."""
    if pairs is None:
        return {i for i in range(1, count, 2) if first is not None and i >= first}
    named = {int(i) for i in pairs.split("+")}
    wrong = sorted(i for i in named if not 1 <= i < count or i - 1 in named)
    if wrong:
        raise ConfigError(
            f"{name} of layer {wrong[0]} cannot be borrowed: there is no layer before it that "
            f"stores codes (pairs {pairs}, {count} full-attention layers)"
        )
    return named


def _check_pair(
    name: str, shape: ModelShape, owner: int, place: int, bits: int, own_bits: int
) -> None:
    why = None
    if bits != own_bits:
        why = "the plan gives them different widths; make the threshold even, or pair other layers"
    elif shape.layers[owner] != shape.layers[place]:
        why = "the layers differ in heads or head size"
    if why:
        raise ConfigError(f"{name} of layers {owner} and {place} cannot share codes: {why}")


def _check_sizes(options: QuantOptions, place: int, layer: LayerShape) -> None:
    for what, size, unit in (("key", layer.key_dim, QUAD), ("value", layer.value_dim, LANES)):
        if size % unit:
            raise ConfigError(
                f"layer {place}: {what} head size {size} is not a multiple of {unit}, which the "
                "packing of codes needs; use cache dense"
            )
    group = value_group(options, layer)
    if layer.value_dim % group:
        raise ConfigError(
            f"layer {place}: value_group {group} does not divide the head size "
            f"{layer.value_dim}; try value_group={math.gcd(group, layer.value_dim)}"
        )


def value_group(options: QuantOptions, layer: LayerShape) -> int:
    """Channels of a value group: no more than a head has."""
    return min(options.value_group, layer.value_dim)


# ---------------------------------------------------------------------------------- what it costs


def folded(options: QuantOptions, rule: str, tokens: int) -> int:
    """Quantised tokens of a sequence of ``tokens``, sinks not counted, once it has been sealed or
    has attended: whole blocks of ``residual``, or all but the newest ``residual``."""
    free = max(0, tokens - options.sink)
    if rule == "block":
        return free // options.residual * options.residual
    return max(0, free - options.residual)


def tail_room(options: QuantOptions, rule: str) -> int:
    """Tokens a tail has room for: as many as wait for a block to be full, or the residual and the
    one that pushes another out of it."""
    return options.residual + (rule != "block")


def nominal_bits(plans: list[LayerPlan]) -> float:
    """Bits of a code, mean over keys and values of all layers; a borrower has none (7.1)."""
    sides = [side for plan in plans for side in (plan.key, plan.value)]
    return sum(s.bits for s in sides if s.owner is None) / len(sides)


def layer_bytes(
    options: QuantOptions,
    plan: LayerPlan,
    layer: LayerShape,
    dtype: torch.dtype,
    tokens: int,
    most: bool = False,
) -> int:
    """Bytes a sealed layer holds at ``tokens`` tokens (7.2), exactly what its storages sum to.

    A tail that is not empty has its ``tail_room``; quantised values have room in whole blocks of
    ``residual``; with ``hold``, the originals of what a rollback may ask for stand beside the codes
    (fewer after a rollback). Tails empty when a block is quantised, so this falls and rises;
    ``most`` bounds it for every length up to ``tokens``, within a step too, when a tail has the
    new token as well.
    """
    size, heads, total = dtype.itemsize, layer.kv_heads, 0
    sides = (
        (plan.key, layer.key_dim, "block", options.key_meta),
        (plan.value, layer.value_dim, options.fold, options.value_meta),
    )
    for i, (side, dim, rule, meta) in enumerate(sides):
        done = folded(options, rule, tokens)
        blocks = -(-done // options.residual)
        room = blocks * options.residual
        sink = min(tokens, options.sink)
        tail = tail_room(options, rule) if tokens - sink > done else 0
        if most:
            tail = options.residual + 1
        originals = done - folded(options, rule, tokens - options.hold)
        if most:
            originals = min(done, options.hold + (rule == "block") * options.residual)
        total += heads * dim * (sink + tail + originals) * size
        if side.owner is None:
            total += heads * dim * room * side.bits // 8
        groups = (
            room // options.group * dim if i == 0 else room * dim // value_group(options, layer)
        )
        parts = 1 if side.owner is not None and options.borrow == "mean" else 2
        if meta in META_DTYPES:
            total += parts * heads * groups * META_DTYPES[meta].itemsize
        else:
            second = room // options.group if i == 0 else blocks
            total += parts * heads * (groups * SECOND_LEVEL[meta] // 8 + second * 2 * 2)
    return total

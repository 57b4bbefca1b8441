"""Quantised caches: KIVI, AsymKV and XQuant, one layer class and one policy with three plans.

Keys per channel, values per token, newest tokens dense (KIVI, arXiv 2402.02750); keys with more
bits than values (AsymKV, arXiv 2410.13212); calibrated levels, and odd layers that read the codes
of the layer before them (XQuant, arXiv 2510.11236). The prompt is attended to unquantised; from
``seal`` on the packed form is what is stored and what attention reads.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from narrows.cache.codes import Codes, KeyCodes, ValueCodes
from narrows.cache.dense import DenseLayer, DensePolicy, capacity
from narrows.cache.plan import (
    LayerPlan,
    QuantOptions,
    Side,
    folded,
    layer_bytes,
    make_plan,
    nominal_bits,
    value_group,
)
from narrows.cache.stretch import Stretch
from narrows.contracts import LayerCache, LayerShape, ModelShape, Span
from narrows.ops import packed
from narrows.ops.packed import PackedLayer


class QuantLayer(LayerCache):
    """One layer: dense until it is sealed, quantised afterwards.

    A step appends, attends, then quantises what has left the residual, so a token is attended to
    dense in the step that reads it. ``owner`` is the layer whose codes this one reads, if any;
    it must be sealed, and take its steps, before this one.
    """

    _record: PackedLayer | None = None

    def __init__(
        self,
        plan: LayerPlan,
        options: QuantOptions,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        key_owner: QuantLayer | None,
        value_owner: QuantLayer | None,
    ) -> None:
        self.plan, self.options, self.shape = plan, options, shape
        self.owners = key_owner, value_owner
        self.dense: DenseLayer | None = DenseLayer(shape, dtype, device)
        self.sides: tuple[Stretch, Stretch] | None = None

    @property
    def length(self) -> int:  # type: ignore[override]
        """See LayerCache."""
        return self.dense.length if self.dense is not None else self._sealed[0].length

    @property
    def _sealed(self) -> tuple[Stretch, Stretch]:
        assert self.sides is not None
        return self.sides

    def seal(self) -> None:
        """See LayerCache: quantise the prompt. Raises NumericalError if it is not finite."""
        if self.dense is None:
            return
        held = self.dense.held
        # Copied out, so that nothing keeps the dense buffers alive.
        self.sides = (
            Stretch(self._codes("keys"), "block", self.options, self.dense.k[:, :held]),
            Stretch(self._codes("values"), self.options.fold, self.options, self.dense.v[:, :held]),
        )
        self.dense = None

    def _codes(self, what: str) -> Codes:
        options, shape = self.options, self.shape
        keys = what == "keys"
        side: Side = self.plan.key if keys else self.plan.value
        owner = self.owners[0 if keys else 1]
        kind = KeyCodes if keys else ValueCodes
        return kind(
            f"{what} of layer {self.plan.place}",
            heads=shape.kv_heads,
            dim=shape.key_dim if keys else shape.value_dim,
            bits=side.bits,
            eta=options.eta(side.bits),
            group=options.group if keys else value_group(options, shape),
            block=options.residual,
            meta=options.key_meta if keys else options.value_meta,
            owner=None if owner is None else owner._sealed[0 if keys else 1].codes,
            fit=options.borrow,
            device=self.dense.k.device if self.dense is not None else torch.device("cpu"),
        )

    def append(self, k: Tensor, v: Tensor) -> None:
        """See LayerCache. Quantises, first, what a step without attention left to do."""
        if self.dense is not None:
            self.dense.append(k, v)
            return
        self._record = None
        for a, b in self.runs(len(k)):
            for side, x in zip(self._sealed, (k, v), strict=True):
                side.fold()
                side.append(x[a:b].transpose(0, 1))

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """See LayerCache."""
        if self.dense is not None:
            return self.dense.attend(q, scale)
        out = packed.attend(self.record(), q, scale)
        self.settle()
        return out

    def settle(self) -> None:
        """See LayerCache. Quantises what has left the residual, an owner's first."""
        for owner in self.owners:
            if owner is not None:
                owner.settle()
        for side in self._sealed:
            if side.fold():
                self._record = None  # which would keep the old storages

    def record(self) -> PackedLayer:
        """What attention reads; shares the storages of this layer and its owner. The last one,
        with other counts, as long as no storage has been replaced."""
        keys, values = self._sealed
        last = self._record
        if (
            last is not None
            and last.k_tail is keys.tail
            and last.v_tail is values.tail
            and last.k_sink is keys.sink
            and last.v_sink is values.sink
            and last.key_codes is keys.codes.borrowed
            and last.value_codes is values.codes.borrowed
            and last.key_zero is keys.codes.zeros()
            and last.value_zero is values.codes.zeros()
        ):
            last.key_tokens, last.value_tokens = keys.codes.tokens, values.codes.tokens
            last.length = keys.length
            return last
        self._record = PackedLayer(
            key_codes=keys.codes.borrowed,
            key_bits=keys.codes.bits,
            key_scale=keys.codes.scales(),
            key_zero=keys.codes.zeros(),
            key_tokens=keys.codes.tokens,
            value_codes=values.codes.borrowed,
            value_bits=values.codes.bits,
            value_scale=values.codes.scales(),
            value_zero=values.codes.zeros(),
            value_tokens=values.codes.tokens,
            group=self.options.group,
            value_group=values.codes.group,
            k_tail=keys.tail,
            v_tail=values.tail,
            k_sink=keys.sink,
            v_sink=values.sink,
            length=keys.length,
        )
        return self._record

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_record": None}  # which holds addresses

    def runs(self, n: int) -> Iterator[Span]:
        """See LayerCache. Nothing leaves the residual within one."""
        if self.dense is not None:
            yield 0, n
            return
        base, start = self._sealed[0].length, 0

        def stored(before: int) -> tuple[int, int, int]:
            """Quantised keys and values, and sinks, when ``before`` of the tokens are there."""
            tokens, options = base + before, self.options
            done = (folded(options, rule, tokens) for rule in ("block", options.fold))
            return (*done, min(tokens, options.sink))  # type: ignore[return-value]

        while start < n:
            stop = start + 1
            while stop < n and stored(stop) == stored(start):
                stop += 1
            yield start, stop
            start = stop

    def ready(self, n: int) -> bool:
        """See LayerCache: not before it is sealed."""
        if self.dense is not None or self._sealed[0].sink_room:
            return False
        if n > 1 and next(self.runs(n)) != (0, n):
            return False
        for side in self._sealed:
            side.fold()
        return packed.takes(self.record(), n)

    def places(self, first_row: int, rows: int) -> Sequence[PackedLayer]:
        """See LayerCache."""
        for side in self._sealed:
            side.grow(rows)
        return (self.record().at(first_row, rows),)

    def rollback(self, n: int) -> None:
        """See LayerCache. After ``seal`` at most ``hold`` tokens can be given back once they have
        pushed others into the codes; more raises ValueError."""
        if self.dense is not None:
            self.dense.rollback(n)
            return
        if not all(side.can_forget(n) for side in self._sealed):
            raise ValueError(
                f"cannot roll back {n} of {self.length} tokens: what they pushed out of the "
                f"residual is quantised; give the cache hold={n}"
            )
        self._record = None
        for side in self._sealed:
            side.forget(n)

    def materialize(self) -> tuple[Tensor, Tensor]:
        """See LayerCache."""
        if self.dense is not None:
            return self.dense.materialize()
        dtype = self._sealed[0].tail.dtype
        k, v = packed.dense(self.record())
        return k.transpose(0, 1).to(dtype), v.transpose(0, 1).to(dtype)

    @property
    def nbytes(self) -> int:
        """See LayerCache: a borrower's codes are its owner's."""
        if self.dense is not None:
            return self.dense.nbytes
        return sum(side.nbytes for side in self._sealed)


@dataclass(frozen=True, slots=True)
class QuantPolicy:
    """Builds quantised layers by a plan. Made by ``kivi``, ``asymkv`` and ``xquant``.

    ``defaults`` are what ``name`` stands for; ``options`` differ from them where the user said so.
    """

    name: str
    options: QuantOptions
    defaults: QuantOptions
    rehearses: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        """See CachePolicy: only what differs from the defaults, in the order of QuantOptions."""
        return self.options.spec(self.name, self.defaults)

    def holding(self, tokens: int) -> QuantPolicy:
        """See CachePolicy."""
        if tokens <= self.options.hold:
            return self
        return replace(self, options=self.options.model_copy(update={"hold": tokens}))

    def resolved(self, shape: ModelShape) -> QuantOptions:
        """The options with the policy's own thresholds for a model of that many layers."""
        count = sum(layer.window is None for layer in shape.layers)
        own = PLANS[self.name](count)
        missing = {k: v for k, v in own.items() if getattr(self.options, k) is None}
        return self.options.model_copy(update=missing)

    def plan(self, shape: ModelShape) -> list[LayerPlan]:
        """The plan of every full-attention layer. Raises ConfigError."""
        return list(_planned(self, shape)[1].values())

    def build(self, shape: ModelShape) -> list[LayerCache]:
        """See CachePolicy. Sliding-window layers are dense."""
        options, plans = _planned(self, shape)
        made: dict[int, QuantLayer] = {}
        layers: list[LayerCache] = []
        for place, layer in enumerate(shape.layers):
            plan = plans.get(place)
            if plan is None:
                layers.append(DenseLayer(layer, shape.dtype, shape.device))
                continue
            owners = (
                made[o] if o is not None else None for o in (plan.key.owner, plan.value.owner)
            )
            made[place] = QuantLayer(plan, options, layer, shape.dtype, shape.device, *owners)
            layers.append(made[place])
        return layers

    def estimate(self, shape: ModelShape, tokens: int, prompt: int | None = None) -> int:
        """See CachePolicy."""
        if prompt is None:
            return DensePolicy().estimate(shape, tokens)
        return self._bytes(shape, tokens, most=True)

    def nbytes(self, shape: ModelShape, tokens: int) -> int:
        """Bytes of a sealed sequence of ``tokens`` tokens, in closed form (``layer_bytes``).
        Sliding-window layers, whose buffers depend on how the tokens came, count as full ones."""
        return self._bytes(shape, tokens, most=False)

    def _bytes(self, shape: ModelShape, tokens: int, most: bool) -> int:
        options, _ = _planned(self, shape)
        total = 0
        for (plan, layer), times in _kinds(self, shape).items():
            if plan is not None:
                one = layer_bytes(options, plan, layer, shape.dtype, tokens, most)
            else:
                one = layer.numbers * max(capacity(tokens), 1) * shape.dtype.itemsize
            total += times * one
        return total

    def nominal_bits(self, shape: ModelShape) -> float:
        """Bits of a code, mean over keys and values (sheet 7.1): without scales and residual."""
        return nominal_bits(self.plan(shape))

    def true_bits(self, shape: ModelShape, tokens: int) -> float:
        """Bits held a number of keys and values, everything counted (7.2)."""
        many = sum(layer.numbers for layer in shape.layers) * tokens
        return 8 * self.nbytes(shape, tokens) / many


@functools.lru_cache(maxsize=16)
def _planned(policy: QuantPolicy, shape: ModelShape) -> tuple[QuantOptions, dict[int, LayerPlan]]:
    """The options and the plan by place in the model. Remembered, since the scheduler asks for
    bytes in every step."""
    options = policy.resolved(shape)
    return options, {p.place: p for p in make_plan(options, shape)}


@functools.lru_cache(maxsize=16)
def _kinds(policy: QuantPolicy, shape: ModelShape) -> Counter[tuple[LayerPlan | None, LayerShape]]:
    """How many layers of the model hold the same bytes, those with sliding windows without plan.
    Plans of layers that differ in their places only are one."""

    def placeless(side: Side) -> Side:
        return replace(side, owner=None if side.owner is None else 0)

    _, plans = _planned(policy, shape)
    alike = {
        place: LayerPlan(0, placeless(plan.key), placeless(plan.value))
        for place, plan in plans.items()
    }
    return Counter((alike.get(place), layer) for place, layer in enumerate(shape.layers))


def _even(part: int, count: int) -> int:
    """``part`` of the paper's 32 layers, scaled to ``count`` and made even."""
    return 2 * round(part * count / 64)


PLANS = {
    "kivi": lambda n: {"key_hi": n, "value_hi": n, "key_share_from": n, "value_share_from": n},
    "asymkv": lambda n: {"key_hi": n, "value_hi": 0, "key_share_from": n, "value_share_from": n},
    "xquant": lambda n: {
        "key_hi": _even(30, n),
        "value_hi": _even(2, n),
        "key_share_from": n,
        "value_share_from": _even(16, n),
    },
}
"""Thresholds by policy and number of layers. XQuant's are the sheet's (30, 2, 32, 16) of 32."""

CALIBRATED = {"eta1": 1 / 6, "eta2": 0.045}


def _policy(name: str, given: dict[str, Any], **defaults: Any) -> QuantPolicy:
    return QuantPolicy(name, QuantOptions(**{**defaults, **given}), QuantOptions(**defaults))


def kivi(**options: Any) -> QuantPolicy:
    """KIVI: all layers alike, plain min-max codes; ``bits`` 2 unless told otherwise."""
    return _policy("kivi", options)


def asymkv(**options: Any) -> QuantPolicy:
    """AsymKV: keys of the first ``key_hi`` layers and values of the first ``value_hi`` in ``bits``,
    the rest in ``lo_bits``; unless told otherwise all keys and no values (nominally 1.5 bits)."""
    return _policy("asymkv", options)


def xquant(**options: Any) -> QuantPolicy:
    """XQuant: as AsymKV, with calibrated levels and shared value codes in the upper half
    (nominally 1.38 bits)."""
    return _policy("xquant", options, **CALIBRATED)

"""Eviction: at the end of its prompt a layer frees the tokens that its scorer rates lowest.

StreamingLLM, H2O, SnapKV, PyramidKV, TOVA, Expected Attention, KVzip and SpindleKV's first stage
(arXiv 2507.06517, section 4 of the sheet) are one policy with different defaults: a scorer
(``cache.scores``), a schedule over layers and a choice per head (``cache.budget``). Every KV head
holds its own tokens in a buffer of its own, so what is dropped is really freed. Tokens read later
are all kept, or, under a ``cap``, evicted again whenever a head holds so many.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Self

from narrows.cache import rehearse
from narrows.cache.budget import layer_counts
from narrows.cache.dense import BLOCK, DenseLayer, DensePolicy, capacity
from narrows.cache.evict_layer import EvictLayer
from narrows.cache.evict_options import STEP, EvictOptions, make_scorer
from narrows.cache.heads import GROWTH, room
from narrows.cache.scores import Scorer
from narrows.contracts import LayerCache, LayerShape, ModelShape
from narrows.errors import BudgetError, ConfigError

MOST_HEADS = 15
"""Query heads that a token's mask has bits for."""


@dataclass(frozen=True, slots=True)
class EvictPolicy:
    """Builds evicting layers. ``defaults`` are what ``name`` stands for; ``options`` differ from
    them where the user said so. Sliding-window layers are dense: they free tokens by themselves."""

    name: str
    options: EvictOptions
    defaults: EvictOptions

    @property
    def spec(self) -> str:
        """See CachePolicy: only what differs from the defaults, in the order of EvictOptions."""
        return self.options.spec(self.name, self.defaults)

    @property
    def rehearses(self) -> bool:
        """See CachePolicy."""
        options = self.options
        drops = options.keep < 1 or options.target_bytes > 0 or options.cap > 0
        return options.score == "reconstruction" and drops

    def holding(self, tokens: int) -> Self:
        """See CachePolicy: tokens that came after the prompt can always be taken back, unless
        something is done behind them. Raises ConfigError for more than a ``cap`` allows."""
        DensePolicy().holding(tokens)
        if not self.options.settles or tokens <= self.options.hold:
            return self
        if self.options.cap and tokens > self.options.cap - self.options.thinned_to:
            raise ConfigError(
                f"cache {self.spec!r}: drafts of {tokens} tokens can be taken back only if an "
                f"eighth of cap is as many; use cap={STEP * tokens} or more, or draft nothing"
            )
        return self._changed(hold=tokens)

    def fitted(self, target_bytes: int) -> Self:
        """This policy with a byte budget in place of a share."""
        return self._changed(target_bytes=target_bytes)

    def _changed(self, **options: int) -> Self:
        changed = self.options.model_dump() | options
        return replace(self, options=type(self.options)(**changed))

    def build(self, shape: ModelShape) -> list[LayerCache]:
        """See CachePolicy."""
        if self.options.heads == "per_query_head":
            most = max(shape.heads // layer.kv_heads for layer in shape.layers)
            if most > MOST_HEADS:
                raise ConfigError(
                    f"heads=per_query_head takes at most {MOST_HEADS} query heads a KV head, but "
                    f"the model has {most}"
                )
        full = [i for i, layer in enumerate(shape.layers) if layer.window is None]
        if not full:
            raise ConfigError(f"{self.name}: the model has sliding-window layers only")
        made: list[LayerCache] = []
        for place, layer in enumerate(shape.layers):
            if layer.window is not None:
                made.append(DenseLayer(layer, shape.dtype, shape.device))
                continue
            scorer = make_scorer(self.options, shape, place)
            made.append(self._layer(scorer, layer, shape, full.index(place), len(full)))
        if self.options.target_bytes:
            stack = [cache for cache in made if isinstance(cache, EvictLayer)]
            for cache in stack:
                cache.stack = stack
        return made

    def _layer(
        self, scorer: Scorer, layer: LayerShape, shape: ModelShape, number: int, layers: int
    ) -> EvictLayer:
        return EvictLayer(self.options, scorer, layer, shape.dtype, shape.device, number, layers)

    def estimate(self, shape: ModelShape, tokens: int, prompt: int | None = None) -> int:
        """See CachePolicy. ``per_query_head`` is counted as if no two heads agreed. Raises
        BudgetError for a prompt whose last window alone is more than ``target_bytes``."""
        if prompt is None:
            more = rehearse.LONGEST if self.rehearses else 0
            return DensePolicy().estimate(shape, tokens + more)
        options, full = self.options, sum(x.window is None for x in shape.layers)
        if options.target_bytes:
            return self._estimate_fitted(shape, tokens, prompt)
        counts = iter(_counts(options, prompt, full))
        total = 0
        for layer in shape.layers:
            size = layer.numbers * shape.dtype.itemsize
            if layer.window is not None:
                total += size * max(capacity(tokens), BLOCK)
                continue
            most = max(next(counts), min(prompt, options.window + options.sinks))
            most = min(most, options.cap or most)
            masks = 0
            if options.heads == "per_query_head":
                group = shape.heads // layer.kv_heads
                most = min(prompt, most * group)
                masks = layer.kv_heads * group * most
            if options.adaptive:  # one head may hold all that the others do not
                most = min(prompt, most * layer.kv_heads)
            more = min(tokens - prompt, max(0, options.cap - most) if options.cap else tokens)
            total += (size * room(most + more) + masks) * copies(options)
        return total

    def _estimate_fitted(self, shape: ModelShape, tokens: int, prompt: int) -> int:
        least = self.options.model_copy(update={"target_bytes": 0, "keep": 1e-9, "hold": 0})
        least_bytes = EvictPolicy("", least, least).estimate(shape, prompt, prompt)
        target = self.options.target_bytes
        if least_bytes > target:
            raise BudgetError(
                f"target_bytes {target:,} is less than the {least_bytes:,} bytes of the first "
                f"{self.options.sinks} and the newest {self.options.window} tokens, which are "
                "always kept"
            )
        dense = DensePolicy().estimate(shape, tokens)
        a_token = sum(layer.numbers for layer in shape.layers)
        if self.options.cap:
            tokens = min(tokens, prompt + self.options.cap)
        grown = (room(tokens) - prompt + GROWTH) * a_token * shape.dtype.itemsize
        return (min(dense, target) + grown) * copies(self.options)


def copies(options: EvictOptions) -> int:
    """Stores of a layer at once: what it held before it evicted again may stay beside it."""
    return 2 if options.cap and options.hold else 1


def kept_at_most(options: EvictOptions, prompt: int, shape: ModelShape) -> int:
    """Tokens that the layer which keeps most keeps a KV head of a prompt."""
    full = sum(layer.window is None for layer in shape.layers)
    return max(*_counts(options, prompt, full), min(prompt, options.window + options.sinks))


@functools.lru_cache(maxsize=64)
def _counts(options: EvictOptions, tokens: int, layers: int) -> tuple[int, ...]:
    """``layer_counts``, remembered, since the scheduler asks for bytes in every step."""
    return tuple(
        layer_counts(options.schedule, options.keep, options.beta, options.window, tokens, layers)
    )


def _policy(name: str, given: dict[str, Any], **usual: Any) -> EvictPolicy:
    return EvictPolicy(name, EvictOptions(**{**usual, **given}), EvictOptions(**usual))


def evict(**options: Any) -> EvictPolicy:
    """Eviction by the attention of the newest 32 queries, the same share in every layer."""
    return _policy("evict", options)


def streaming(**options: Any) -> EvictPolicy:
    """StreamingLLM (arXiv 2309.17453): the first four tokens and the newest."""
    return _policy("streaming", options, score="recency", window=1, sinks=4)


def h2o(**options: Any) -> EvictPolicy:
    """H2O (arXiv 2306.14048): half the newest tokens, half those that received most attention."""
    return _policy("h2o", options, score="accumulated", window=1, recent=0.5, heads="mean")


def tova(**options: Any) -> EvictPolicy:
    """TOVA (arXiv 2401.06104): what the last query attends to, on average over a layer's heads."""
    return _policy("tova", options, window=1, heads="layer")


def snapkv(**options: Any) -> EvictPolicy:
    """SnapKV (arXiv 2404.14469) as kvpress sets it: 64 queries, pooled over 5 neighbours."""
    return _policy("snapkv", options, **SNAPKV)


def pyramidkv(**options: Any) -> EvictPolicy:
    """PyramidKV (arXiv 2406.02069): SnapKV with fewer tokens the deeper the layer."""
    return _policy("pyramidkv", options, **SNAPKV, schedule="pyramidkv", beta=20.0)


def expected(**options: Any) -> EvictPolicy:
    """Expected Attention: what queries to come are expected to attend to."""
    return _policy("expected", options, score="expected", window=1, sinks=4, heads="mean")


def kvzip(**options: Any) -> EvictPolicy:
    """KVzip: what repeating the prompt attends to. Reads every prompt twice."""
    return _policy("kvzip", options, score="reconstruction", window=1, sinks=4, heads="max")


SNAPKV = {"pool": "avg", "pool_kernel": 5, "window": 64, "heads": "mean"}

"""Eviction: at the end of its prompt a layer frees the tokens that its scorer rates lowest.

StreamingLLM, H2O, SnapKV, PyramidKV, TOVA, Expected Attention, KVzip and SpindleKV's first stage
(arXiv 2507.06517, section 4 of the sheet) are one policy with different defaults: a scorer
(``cache.scores``), a schedule over layers and a choice per head (``cache.budget``). Every KV head
holds its own tokens in a buffer of its own, so what is dropped is really freed. Tokens read later
are all kept, or, under a ``cap``, evicted again whenever a head holds so many.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from narrows.cache import rehearse, scores
from narrows.cache.budget import Choice, Heads, Schedule, choose, layer_counts
from narrows.cache.dense import BLOCK, FEW, DenseLayer, DensePolicy, capacity
from narrows.cache.heads import GROWTH, HeadStore, room
from narrows.cache.scores import Scorer
from narrows.config import Settings
from narrows.contracts import LayerCache, LayerShape, ModelShape, Span
from narrows.errors import BudgetError, ConfigError
from narrows.ops import ragged

MOST_HEADS = 15
"""Query heads that a token's mask has bits for."""

CLOSE = 0.97
"""A byte budget is met if so much of it is used."""

STEP = 8
"""Evicting again frees one in so many tokens at once, since it copies those that stay."""

SINKS = 4
"""First tokens that stay, at least, when tokens are evicted again by their age."""

ScorerName = Literal[
    "window",
    "accumulated",
    "expected",
    "reconstruction",
    "key_norm",
    "key_difference",
    "recency",
    "random",
]


class EvictOptions(Settings):
    """Options of the eviction policies.

    ``keep`` is the share of the prompt's tokens that stays, on average over layers. The newest
    ``window`` tokens and the first ``sinks`` are among them. ``recent`` is the share of a layer's
    tokens that goes to the newest ones, if that is more than ``window``. ``score`` names a scorer
    of ``cache.scores``; ``score_norm``, ``pool`` and ``pool_kernel`` are of those that read
    attention. ``target_bytes`` takes the place of ``keep``: what a prompt leaves takes at most so
    many bytes in all full-attention layers. ``schedule`` and ``beta``, ``heads``, ``adaptive`` and
    ``floor`` are explained in ``cache.budget``. ``seed`` is of the random scorer. ``cap`` is how
    many tokens a KV head may hold (0: any number), see ``EvictLayer``; ``hold`` tokens can be
    rolled back over an eviction that it made necessary.
    """

    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    target_bytes: Annotated[int, Field(ge=0)] = 0
    score: ScorerName = "window"
    window: Annotated[int, Field(ge=1)] = 32
    sinks: Annotated[int, Field(ge=0)] = 0
    recent: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    score_norm: Literal["window", "eq2"] = "window"
    pool: Literal["none", "avg", "max"] = "none"
    pool_kernel: Annotated[int, Field(ge=1)] = 7
    schedule: Schedule = "flat"
    beta: Annotated[float, Field(gt=0.0)] = 0.05
    heads: Heads = "union"
    adaptive: bool = False
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    seed: int = 0
    cap: Annotated[int, Field(ge=0)] = 0
    hold: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pool_kernel % 2 == 0:
            raise ValueError("pool_kernel must be odd")
        if self.adaptive and self.heads not in ("mean", "max"):
            raise ValueError(f"adaptive needs heads=mean or max, not {self.heads}")
        if self.schedule == "pyramid" and self.beta >= 1:
            raise ValueError("beta must be below 1 with schedule=pyramid")
        if self.schedule == "pyramidkv" and self.beta < 1:
            raise ValueError("beta must be at least 1 with schedule=pyramidkv")
        least = max(self.sinks, SINKS) + self.newest
        if self.cap and self.thinned_to < least:
            raise ValueError(
                f"cap must leave room for the {least} first and newest tokens, which always stay, "
                f"when an eighth of it is freed: at least {-(-least * STEP // (STEP - 1))}"
            )
        if self.cap and self.hold > self.cap - self.thinned_to:
            raise ValueError("hold must not exceed an eighth of cap")
        return self

    @property
    def newest(self) -> int:
        """Newest tokens that are never evicted again."""
        return self.window

    @property
    def thinned_to(self) -> int:
        """Tokens of a head that are left of ``cap``."""
        return self.cap * (STEP - 1) // STEP

    @property
    def settles(self) -> bool:
        """Whether tokens read later can change how earlier ones are held."""
        return self.cap > 0


def make_scorer(options: EvictOptions, shape: ModelShape, place: int) -> Scorer:
    """A scorer for layer number ``place``. Raises ConfigError if the model cannot be scored so."""
    if options.keep == 1 and not options.target_bytes and not options.cap:
        return scores.Recency()  # nothing will be dropped, so nothing need be looked at
    if options.score == "window":
        return scores.WindowAttention(
            options.window, options.score_norm, options.pool, options.pool_kernel
        )
    if options.score == "accumulated":
        return scores.AccumulatedAttention(options.score_norm)
    if options.score == "expected":
        if shape.rotary is None:
            raise ConfigError("score=expected needs a loaded model's rotary tables")
        return scores.ExpectedAttention(shape.rotary, options.sinks)
    return key_scorer(options, place) or scores.Reconstruction()


def key_scorer(options: EvictOptions, number: int) -> Scorer | None:
    """The scorer, if it needs nothing but the tokens to be rated; ``number`` is the layer's."""
    if options.score == "random":
        return scores.Chance(options.seed * 1009 + number)
    plain: dict[str, Callable[[], Scorer]] = {
        "key_norm": scores.KeyNorm,
        "key_difference": scores.KeyDifference,
        "recency": scores.Recency,
    }
    made = plain.get(options.score)
    return None if made is None else made()


class EvictLayer(LayerCache):
    """One layer: dense while its prompt is read, then what ``seal`` keeps of it and all later
    tokens.

    ``number`` counts full-attention layers, of which the model has ``layers``. ``stack`` are all
    of them where they must keep one byte budget together.

    With a ``cap``, when a head that holds so many tokens is to take another, every head is thinned
    to seven eighths of it: by the scorer if that looks at keys only, else by age, the first tokens
    excepted, since nothing is noted of attention any more.
    """

    def __init__(
        self,
        options: EvictOptions,
        scorer: Scorer,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        number: int,
        layers: int,
    ) -> None:
        self.options, self.number, self.layers = options, number, layers
        self.prompt: DenseLayer | None = DenseLayer(shape, dtype, device)
        self.scorer: Scorer | None = scorer
        self.store: HeadStore | None = None
        self.stack: list[EvictLayer] = []
        self._rated: Tensor | None = None
        self._length = self._sealed_at = self._evicted_at = 0
        self.before: EvictLayer | None = None
        """This layer as it was when it last evicted again, while that may have to be undone."""

    @property
    def length(self) -> int:  # type: ignore[override]
        """See LayerCache: tokens read, those dropped since included."""
        return self._length if self.prompt is None else self.prompt.length

    @property
    def kept(self) -> HeadStore:
        """What a sealed layer holds."""
        assert self.store is not None
        return self.store

    def seal(self) -> None:
        """See LayerCache: rate the prompt's tokens, keep the best, free the rest."""
        if self.prompt is None:
            return
        if self.stack:
            _fit(self.stack, self.options.target_bytes)
        else:
            self.thin(self.options.keep)
        for layer in self.stack or [self]:
            layer.prompt, layer.scorer, layer.stack, layer._rated = None, None, [], None

    def thin(self, keep: float) -> None:
        """Make the store of a share ``keep`` of the prompt, which stays until ``seal``."""
        assert self.prompt is not None
        choice = self.choice(keep)
        self._length = self._sealed_at = self.prompt.length
        self.store = HeadStore(self.prompt.k, self.prompt.v, choice)
        self._encode(choice)

    def _encode(self, choice: Choice) -> None:
        """Told which tokens are in the store; a layer may hold them otherwise now."""

    def choice(self, keep: float) -> Choice:
        """What is kept of the prompt, at a share ``keep``."""
        assert self.prompt is not None
        assert self.scorer is not None
        options, tokens = self.options, self.prompt.length
        count = layer_counts(
            options.schedule, keep, options.beta, options.window, tokens, self.layers
        )[self.number]
        count = min(count, options.cap or count)
        window = min(tokens, max(options.window, int(options.recent * count)))
        return choose(
            self._rating(),
            count,
            heads=options.heads,
            kv_heads=self.prompt.shape.kv_heads,
            sinks=options.sinks,
            window=window,
            adaptive=options.adaptive,
            floor=options.floor,
        )

    def _rating(self) -> Tensor:
        """The scorer's, taken once: a byte budget may try several shares."""
        assert self.prompt is not None
        assert self.scorer is not None
        if self._rated is None or self._rated.shape[1] != self.prompt.length:
            self._rated = self.scorer.rate(self.prompt)
        return self._rated

    def append(self, k: Tensor, v: Tensor) -> None:
        """See LayerCache."""
        for a, b in self._runs(len(k)):
            self._add(k[a:b], v[a:b])

    def _add(self, k: Tensor, v: Tensor) -> None:
        if self.prompt is not None:
            self.prompt.append(k, v)
        else:
            self.kept.append(k, v)
            self._length += len(k)

    def _runs(self, n: int) -> Iterator[Span]:
        """The next ``n`` tokens in runs, before each of which what is due is done: to read a run
        at once is to read its tokens one by one."""
        if self.prompt is not None:
            yield 0, n
            return
        start = 0
        while start < n:
            self._settle()
            stop = min(n, start + self._room())
            yield start, stop
            start = stop

    def _settle(self) -> None:
        """Do what is due before another token comes. That is as late as it can be done: until then
        nobody knows which tokens will stay."""
        if self._length - self._evicted_at >= self.options.hold:
            self.before = None
        while self._room() == 0:
            self._make_room()

    def _room(self) -> int:
        """Tokens that can be appended before something is due."""
        return max(0, self.options.cap - max(self.kept.held)) if self.options.cap else 2**62

    def _make_room(self) -> None:
        """Evict again."""
        options, kept = self.options, self.kept
        scorer, sinks = key_scorer(options, self.number), options.sinks
        if scorer is None:
            scorer, sinks = scores.Recency(), max(sinks, SINKS)
        chosen = []
        for head in range(len(kept.held)):
            k, v = (kept.whole(side, head)[:, None] for side in (0, 1))
            alone = DenseLayer(LayerShape(1, k.shape[2], v.shape[2]), k.dtype, k.device)
            alone.append(k, v)
            rated = scorer.rate(alone)
            best = choose(
                rated,
                options.thinned_to,
                heads="mean",
                kv_heads=1,
                sinks=sinks,
                window=options.newest,
            )
            chosen += best.tokens
        self.before = None
        if options.hold:
            self.before = copy.copy(self)
        self.store, self._evicted_at = kept.thinned(chosen), self._length

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """See LayerCache."""
        if self.prompt is None:
            return self.kept.attend(q, scale)
        assert self.scorer is not None
        return self.scorer.attend(q, self.prompt, scale)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``append`` and ``attend`` such that to take tokens at once is to take them one by one."""
        outs = []
        for a, b in self._runs(len(k)):
            self._add(k[a:b], v[a:b])
            outs.append(self.attend(q[a:b], scale))
        return torch.cat(outs)

    def ready(self, n: int) -> bool:
        """Get ready for ``n`` new tokens; whether the kernel for few can take them at once."""
        if self.prompt is not None:
            return False
        self._settle()
        return n <= min(FEW, self._room())

    @classmethod
    def step(
        cls,
        caches: Sequence[LayerCache],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Sequence[Span],
        scale: float,
    ) -> Tensor:
        """See LayerCache. On the CPU all sealed sequences with few new tokens go in one kernel
        call, which takes each of their KV heads for a sequence of its own."""
        few: list[tuple[EvictLayer, Span]] = []
        rest: list[tuple[EvictLayer, Span]] = []
        group = q.shape[1] // k.shape[1]
        for cache, (a, b) in zip(caches, spans, strict=True):
            assert isinstance(cache, EvictLayer)
            quick = cache.ready(b - a) and ragged.supported(q, cache.kept.k[0], group)
            (few if quick else rest).append((cache, (a, b)))
        empty = q.new_empty((*q.shape[:2], v.shape[2]))
        out = _step_few(few, q, k, v, scale) if few else empty
        for cache, (a, b) in rest:
            out[a:b] = cache.advance(q[a:b], k[a:b], v[a:b], scale)
        return out

    def rollback(self, n: int) -> None:
        """See LayerCache. What came before ``seal`` cannot be taken back after it, nor more than
        ``hold`` tokens once something has been done behind them: ValueError."""
        if self.prompt is not None:
            self.prompt.rollback(n)
            return
        if not 0 <= n <= self._length - self._sealed_at:
            raise ValueError(f"cannot roll back {n} tokens: the prompt has been thinned out")
        n = self._undo(n)
        self.kept.drop(n)
        self._length -= n

    def _undo(self, n: int) -> int:
        """Undo what was done behind the newest ``n`` tokens; how many of them are still there."""
        if self._length - n >= self._evicted_at:
            return n
        if self.before is None or n > self.options.hold:
            raise ValueError(
                f"cannot roll back {n} tokens: others have been evicted behind them; give the "
                f"cache hold={n}"
            )
        n -= self._length - self._evicted_at
        vars(self).update(vars(self.before))
        return n

    def materialize(self) -> tuple[Tensor, Tensor]:
        """See LayerCache. Raises ConfigError where KV heads hold different numbers of tokens."""
        if self.prompt is not None:
            return self.prompt.materialize()
        held = self.kept.held
        if len(set(held)) > 1:
            raise ConfigError("KV heads hold different numbers of tokens")
        heads = range(len(held))
        k, v = (torch.stack([self.kept.whole(side, h) for h in heads], 1) for side in (0, 1))
        return k, v

    @property
    def nbytes(self) -> int:
        """See LayerCache."""
        if self.prompt is not None:
            return self.prompt.nbytes
        return self.kept.nbytes + (0 if self.before is None else self.before.nbytes)


def _fit(layers: Sequence[EvictLayer], target: int) -> None:
    """Thin the layers' prompts so that their stores take at most ``target`` bytes, and little
    less: a share is tried, measured and corrected."""

    def size(keep: float) -> int:
        for layer in layers:
            layer.thin(keep)
        return sum(layer.kept.nbytes for layer in layers)

    low, high = 0.0, 1.0
    taken = size(1.0)
    keep = 1.0
    while taken > target or (keep < 1.0 and taken < CLOSE * target):
        if taken > target:
            high = keep
        else:
            low = keep
        if high - low < 1e-3 and (low > 0.0 or high < 1e-9):
            if taken > target and low > 0.0:
                size(low)
            return
        # Bytes grow about in proportion to what is kept; halving guards against a bad guess.
        guess = keep * (1 + CLOSE) / 2 * target / taken
        keep = guess if low < guess < high else (low + high) / 2
        taken = size(keep)


def _step_few(
    few: list[tuple[EvictLayer, Span]], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    rows, kv_heads = k.shape[:2]
    places: list[ragged.Place] = []
    for cache, (a, b) in few:
        kept = cache.kept
        kept.grow(b - a)
        cache._length += b - a
        places += [kept.place(head, head * rows + a, b - a) for head in range(kv_heads)]

    def by_head(x: Tensor) -> Tensor:
        if rows == 1:
            return x.reshape(kv_heads, -1, x.shape[2])
        split = x.reshape(rows, kv_heads, -1, x.shape[2]).transpose(0, 1)
        return split.reshape(kv_heads * rows, -1, x.shape[2])

    mixed = ragged.append_attend(places, by_head(q), by_head(k), by_head(v), scale, None)
    if rows == 1:
        return mixed.view(1, -1, v.shape[2])
    return mixed.view(kv_heads, rows, -1, v.shape[2]).transpose(0, 1).flatten(1, 2).contiguous()


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

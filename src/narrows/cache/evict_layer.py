"""A layer that evicts: at the end of its prompt it frees the tokens its scorer rates lowest."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from narrows.cache import scores
from narrows.cache.budget import Choice, choose, layer_counts
from narrows.cache.dense import FEW, DenseLayer
from narrows.cache.evict_options import SINKS, EvictOptions, key_scorer
from narrows.cache.heads import HeadStore
from narrows.cache.scores import Scorer
from narrows.contracts import LayerCache, LayerShape, Span
from narrows.errors import ConfigError
from narrows.ops import ragged

CLOSE = 0.97
"""A byte budget is met if so much of it is used."""


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
        for a, b in self.runs(len(k)):
            if self.prompt is not None:
                self.prompt.append(k, v)
            else:
                self.kept.append(k[a:b], v[a:b])
                self._length += b - a

    def runs(self, n: int) -> Iterator[Span]:
        """See LayerCache. Before each what is due is done."""
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

    def ready(self, n: int) -> bool:
        """See LayerCache: not before it is sealed."""
        if self.prompt is not None:
            return False
        self._settle()
        return n <= min(FEW, self._room())

    def places(self, first_row: int, rows: int) -> Sequence[ragged.Place]:
        """See LayerCache. One for each KV head."""
        kept = self.kept
        kept.grow(rows)
        self._length += rows
        return kept.places(first_row, rows)

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

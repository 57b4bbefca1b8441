"""SpindleKV: eviction, then a codebook of what is left (arXiv 2507.06517).

Every layer first frees tokens (``cache.evict``), most of them in deep layers; what stays, behind
the newest, is then coded (``cache.codebook``), which pays most in shallow ones. A side of a head
whose code would not be smaller stays dense. Tokens read later join the books in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from narrows.cache.budget import Choice
from narrows.cache.codebook import Codebook, Rule
from narrows.cache.evict import SNAPKV, EvictPolicy, copies
from narrows.cache.evict_layer import EvictLayer
from narrows.cache.evict_options import EvictOptions
from narrows.cache.heads import HeadStore, room, step
from narrows.cache.scores import Scorer
from narrows.contracts import LayerShape, ModelShape
from narrows.errors import ConfigError

Preset = Literal["tuned", "rehearsed", "asked", "fair", "paper", "codebook_only", "evict_only"]


class SpindleOptions(EvictOptions):
    """Options of ``spindle``: those of eviction, and of the codebook.

    ``theta_k`` and ``theta_v`` are the cosines above which keys and values share an entry; 1 codes
    nothing. A side of a head is coded where that takes less than ``pays`` of what it stands for,
    since codes are slower to read. Graphs have at most ``block`` vectors. ``cover`` is the paper's
    greedy rule, or greedy set cover (ours). The newest ``tail`` tokens, and the window at the end
    of the prompt, are dense; of later tokens ``fold_every`` are coded at once (0: never). ``hold``
    tokens can be rolled back over such a step, too.
    """

    preset: Preset = "fair"
    theta_k: Annotated[float, Field(gt=-1.0, le=1.0)] = 0.98
    theta_v: Annotated[float, Field(gt=-1.0, le=1.0)] = 0.95
    pays: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    block: Annotated[int, Field(ge=1, le=16384)] = 2048
    cover: Literal["paper", "setcover"] = "paper"
    tail: Annotated[int, Field(ge=0)] = 64
    fold_every: Annotated[int, Field(ge=0)] = 64

    @model_validator(mode="after")
    def _check_fold(self) -> Self:
        if self.fold_every and self.hold > min(self.fold_every, max(self.tail, self.window)):
            raise ValueError("hold must not exceed fold_every, nor both tail and window")
        return self

    @property
    def newest(self) -> int:
        """See EvictOptions: what is still to be coded stays as well."""
        return max(self.tail, self.window) + self.fold_every

    @property
    def settles(self) -> bool:
        """See EvictOptions."""
        return super().settles or self.fold_every > 0

    def rule(self, side: int) -> Rule:
        """When vectors of side 0, keys, or 1, values, are alike."""
        theta = (self.theta_k, self.theta_v)[side]
        return Rule(theta, self.block, self.cover == "setcover")


@dataclass(frozen=True, slots=True)
class Folded:
    """What undoes a fold of one side of one head: the book's tokens and entries before, and the
    dense tokens ``[n, dim]`` that went into it."""

    side: int
    head: int
    tokens: int
    entries: int
    dense: Tensor


class SpindleLayer(EvictLayer):
    """An evicting layer whose sealed tokens are coded where that is smaller."""

    options: SpindleOptions

    def __init__(
        self,
        options: SpindleOptions,
        scorer: Scorer,
        layer: LayerShape,
        shape: ModelShape,
        number: int,
        layers: int,
    ) -> None:
        super().__init__(options, scorer, layer, shape.dtype, shape.device, number, layers)
        self.rotary = shape.rotary
        self.coded_until = self.folded_at = 0
        self.coding = False
        self.fold: list[Folded] | None = None

    def _encode(self, choice: Choice) -> None:
        """Code what stays before the window. A head of its own each, with its query heads'
        copies of a token as the token's weight."""
        options, kept, end = self.options, self.kept, self.length
        self.coded_until = max(0, end - options.window)
        for head, tokens in enumerate(choice.tokens):
            old = tokens < self.coded_until
            n = int(old.sum())
            weights = None if choice.seen is None else choice.seen[head].sum(0)[:n]
            for side in (0, 1):
                if n and options.rule(side).threshold < 1:
                    self._code(kept, side, head, tokens[:n], weights)
        self.coding = any(map(any, kept.books))

    def _code(
        self, kept: HeadStore, side: int, head: int, places: Tensor, weights: Tensor | None
    ) -> None:
        dense = kept.dense(side, head)[0]
        n = len(places)
        book = Codebook(self.options.rule(side), self.rotary if side == 0 else None)
        book.extend(dense[:n], places, weights)
        coded = sum(x.untyped_storage().nbytes() for x in book.tensors)
        spared = room(len(dense)) - room(len(dense) - n)
        if coded < self.options.pays * spared * dense.shape[1] * dense.element_size():
            rest = dense[n:].clone()
            kept.books[side][head] = book
            kept.put(side, head, rest)

    def _room(self) -> int:
        """See EvictLayer: or before the next block must be coded."""
        return min(super()._room(), self._uncoded())

    def _make_room(self) -> None:
        """See EvictLayer: or code a block."""
        if self._uncoded() == 0:
            self._fold()
        else:
            super()._make_room()
            self.fold = None  # what is undone over an eviction is undone in ``before``

    def _uncoded(self) -> int:
        """Tokens that can be appended before the next block must be coded."""
        options = self.options
        if not options.fold_every or not self.coding:
            return 2**62
        return max(0, self.coded_until + options.newest - self.length)

    def _fold(self) -> None:
        """Code the oldest ``fold_every`` dense tokens of the sides that have a book."""
        kept, n, first = self.kept, self.options.fold_every, self.coded_until
        before = []
        for side in (0, 1):
            for head, book in enumerate(kept.books[side]):
                if book is None or book.entries is None:
                    continue
                dense = kept.dense(side, head)[0]
                gone, rest = dense[:n].clone(), dense[n:].clone()
                before.append(Folded(side, head, len(book), len(book.entries), gone))
                book.extend(gone, torch.arange(first, first + n, device=gone.device))
                kept.put(side, head, rest)
        self.fold = before if self.options.hold else None
        self.folded_at = self.length
        self.coded_until += n

    def _undo(self, n: int) -> int:
        """See EvictLayer: or that a block was coded."""
        n = super()._undo(n)
        if self.length - n < self.folded_at:
            if self.fold is None or n > self.options.hold:
                raise ValueError(
                    f"cannot roll back {n} tokens: a block has been coded behind them; give the "
                    f"cache hold={n}"
                )
            self._unfold(self.fold)
        return n

    def _unfold(self, fold: list[Folded]) -> None:
        for part in fold:
            book = self.kept.books[part.side][part.head]
            assert book is not None
            rest = self.kept.dense(part.side, part.head)[0].clone()
            book.cut(part.tokens, part.entries)
            self.kept.put(part.side, part.head, torch.cat([part.dense, rest]))
        self.coded_until -= self.options.fold_every
        self.folded_at -= self.options.fold_every
        self.fold = None

    @property
    def nbytes(self) -> int:
        """See LayerCache."""
        saved = [part.dense for part in self.fold or ()]
        return super().nbytes + sum(x.untyped_storage().nbytes() for x in saved)


@dataclass(frozen=True, slots=True)
class SpindlePolicy(EvictPolicy):
    """Builds spindle layers; see EvictPolicy."""

    options: SpindleOptions

    def _layer(
        self, scorer: Scorer, layer: LayerShape, shape: ModelShape, number: int, layers: int
    ) -> EvictLayer:
        if shape.rotary is None:
            raise ConfigError(f"{self.name} needs a loaded model's rotary tables")
        return SpindleLayer(self.options, scorer, layer, shape, number, layers)

    def estimate(self, shape: ModelShape, tokens: int, prompt: int | None = None) -> int:
        """See CachePolicy. Codes made while decoding may be larger than what they stand for."""
        bound = EvictPolicy.estimate(self, shape, tokens, prompt)
        options = self.options
        if prompt is None:
            return bound
        heads = sum(layer.kv_heads for layer in shape.layers)
        width = max(layer.key_dim + layer.value_dim for layer in shape.layers)
        if min(options.theta_k, options.theta_v) < 1:
            # Codes are smaller than the buffer they spare, but what stays dense may soon grow one.
            most = min(tokens, options.cap or tokens)
            bound += heads * width * shape.dtype.itemsize * step(most)
        if not options.settles:
            return bound
        held = options.fold_every * width * shape.dtype.itemsize if options.hold else 0
        # Of what is evicted again the codes of the prompt, too, may shrink less than they spared.
        coded = options.cap * copies(options) if options.cap else tokens - prompt
        return bound + heads * (coded * OVERHEAD + held * copies(options))


OVERHEAD = 32
"""Bytes, at most, of index, ratio, turns and origin of a token's key and value."""

PRESETS: dict[str, dict[str, Any]] = {
    "fair": {"heads": "max", "schedule": "pyramid"},
    "paper": {"heads": "per_query_head", "schedule": "pyramid", "pays": 1.0},
    "codebook_only": {"keep": 1.0, "pays": 1.0},
    "evict_only": {"heads": "max", "schedule": "pyramid", "theta_k": 1.0, "theta_v": 1.0},
    "tuned": {"score": "accumulated", "recent": 0.25, "sinks": 4, "heads": "mean"},
    "rehearsed": {"score": "reconstruction", "recent": 0.1, "sinks": 4, "heads": "max"},
    "asked": SNAPKV,
}
"""``paper`` chooses tokens for every query head (equation 7) and codes whatever shrinks, ``fair``
chooses for every KV head, so that what it keeps is what it holds; ``codebook_only`` and
``evict_only`` leave out one of the stages. ``tuned``, ``rehearsed`` and ``asked`` are ours: the
paper's codebook behind what H2O, KVzip and SnapKV keep, the same share in every layer;
``rehearsed`` reads a prompt twice and needs no question to go by, which ``asked`` looks for at the
prompt's end."""


def spindle(preset: str = "fair", **options: Any) -> SpindlePolicy:
    """SpindleKV. Raises ConfigError for an unknown preset or option."""
    if preset not in PRESETS:
        raise ConfigError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    usual = PRESETS[preset]
    made = SpindleOptions(**{**usual, **options, "preset": preset})
    return SpindlePolicy("spindle", made, SpindleOptions(**usual))

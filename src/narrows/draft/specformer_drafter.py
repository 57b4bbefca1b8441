"""Runs a trained SpecFormer beside an engine."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from narrows.cache.dense import DenseLayer, DensePolicy
from narrows.config import Settings
from narrows.contracts import (
    Asked,
    Draft,
    Drafter,
    FlatBatch,
    Kept,
    LayerShape,
    Offer,
    Reading,
    Sort,
    Span,
)
from narrows.draft.specformer import GroupedRMSNorm, SpecFormer, SpecFormerConfig
from narrows.draft.specs import shipped_for
from narrows.errors import ConfigError
from narrows.model.flat import FlatModel
from narrows.ops import native
from narrows.ops.forecast import Forecaster
from narrows.ops.ragged import MAX_GROUP

RECENT = 128
"""Tokens of a prompt that are looked at, its last. The shipped module guesses no worse than from
all, and reading a long prompt would take it a while."""
PROMPT = 64
"""A step that shows so many tokens of a sequence reads its prompt, and they are taken in at once,
so that the first draft costs no more than others."""
LET_GO = 512
IDLE = 32
"""All others wait for the next draft. A sequence for which so many wait, or those of so many
steps, gets no draft any more, and they are dropped, so that a drafter that is not used costs next
to nothing."""

RESTING, PROBED = 8, 2
"""Once so many sequences have come since a draft was last asked for in a step of about as many,
only one of PROBED times as many as decode at once, counted in powers of two, is followed, to see
whether drafts are wanted again: following one has a cost, too, most of all while its prompt is
read, and while none is, no step is tapped."""

NONE = -1
"""Stands where no guess is."""

EXPECTED = 0.4, 0.45
"""Chances of the first slot and of later ones, to begin with: on texts unlike its lessons."""


class SpecFormerOptions(Settings):
    """``folder`` holds the module, the one that comes with the package by default; ``recent`` as
    RECENT."""

    folder: Path | None = None
    recent: Annotated[int, Field(ge=1)] = RECENT


class SpecFormerDrafter(Drafter):
    """A trained module beside its target. Guesses are the likeliest tokens of the slots, each given
    the guess before it where the module looks at that. It makes none for a sequence whose prompt
    it has not seen, such as one that goes on from a saved cache. ``recent`` as RECENT.

    Raises ConfigError if the module belongs to another target.
    """

    name = "specformer"

    def __init__(self, module: SpecFormer, target: FlatModel, recent: int = RECENT) -> None:
        config = module.config
        check_target(config, target)
        self.target = target
        self.module = (
            module.to(target.shape.device, target.shape.dtype).eval().requires_grad_(False)
        )
        self.most, self.taps, self.recent = config.slots, config.taps, recent
        self._sorts = Sort.by_place(*EXPECTED, self.most)
        head = target.head
        self.named: Tensor | None = None
        if config.draft_vocab is not None:
            self.named = self.module.vocabulary.long()
            head = head[self.named]
        self.head = head.contiguous()
        self.scale = config.head_dim**-0.5
        self.shape = LayerShape(config.kv_heads, config.head_dim, config.head_dim)
        with torch.inference_mode():
            self.narrowed = self.module.narrowed(target.embed(torch.arange(config.vocab_size)))
        every = torch.arange(target.shape.max_tokens, device=target.shape.device)
        self.cosine, self.sine = target.rotary(every)
        self.fast = _forecaster(self)
        self._states: dict[int, _State] = {}
        self._came: Counter[int] = Counter()
        """Since a draft was last asked for: by the size of steps, as a power of two."""
        self._size = 0
        """Of the step that is being prepared, likewise."""
        self._held = replace(target.shape, layers=(self.shape,))
        self._unread = 2 * LET_GO * len(self.taps) * config.hidden_size * 4
        """Bytes that what waits for a sequence may keep, at most."""

    def estimate(self, tokens: int) -> int:
        """See Drafter."""
        return DensePolicy().estimate(self._held, tokens) + self._unread

    def wants(self, work: Sequence[Reading]) -> list[int]:
        """See Drafter. Chooses which new sequences are followed."""
        size, firsts = len(work).bit_length(), []
        for number, start, stop, known in work:
            if start == 0:
                self._came[size] += 1
                self._states.pop(number, None)
                if self._came[size] <= RESTING or self._came[size] % (PROBED << size) == 0:
                    self._states[number] = _State(self._cache(), max(0, known - self.recent))
            state = self._states.get(number)
            firsts.append(stop if state is None else min(max(start, state.first), stop))
        return firsts

    def read(self, taps: Tensor, kept: Sequence[Kept]) -> None:
        """See Drafter. A prompt is taken in at once, the rest with the next draft."""
        due, few, taken = [], [], 0
        for rows in kept:
            state, count = self._states[rows.number], rows.stop - rows.first
            state.waiting += count
            if count >= PROMPT:
                state.unread.append((taps, rows.first, rows.stop))
                due.append(state)
            elif state.waiting > LET_GO or len(state.unread) == IDLE:
                del self._states[rows.number]
            else:
                few.append((state, rows))
        if few:
            wanted = [i for _, rows in few for i in range(rows.first, rows.stop)]
            # Parts keep all that was read in this step, so a copy of these unless they are half.
            half = 2 * len(wanted) >= len(taps)
            chosen = taps if half else taps[wanted]
            for state, rows in few:
                first = rows.first if half else taken
                taken += rows.stop - rows.first
                state.unread.append((chosen, first, first + rows.stop - rows.first))
        if due:
            self._catch_up(due)

    @torch.inference_mode()
    def _catch_up(self, states: Sequence[_State]) -> None:
        """Take in what has gathered for sequences, in one pass."""
        unread = [rows[a:b] for state in states for rows, a, b in state.unread]
        taps = torch.cat(unread) if len(unread) > 1 else unread[0]
        ends = list(itertools.accumulate(state.waiting for state in states))
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        if self.fast is not None:
            places = [s.cache.places(a, b - a)[0] for s, (a, b) in zip(states, spans, strict=True)]
            contexts = self.fast.absorb(places, ends, taps)
        else:
            contexts = self._contexts(states, taps, spans)
        for state, context in zip(states, contexts, strict=True):
            state.context = context
            state.unread.clear()
            state.waiting = 0

    def _contexts(self, states: Sequence[_State], taps: Tensor, spans: list[Span]) -> Tensor:
        """``Forecaster.absorb`` by the module, which defines it."""
        module = self.module
        places = [
            torch.arange(state.cache.length, state.cache.length + b - a)
            for state, (a, b) in zip(states, spans, strict=True)
        ]
        positions = torch.cat(places).to(taps.device)
        x = module.fused(taps)
        q, k, v = module.queries(x, self.cosine[positions], self.sine[positions])
        batch = FlatBatch(spans, [[state.cache] for state in states])
        mixed = batch.attend(0, q.contiguous(), k.contiguous(), v.contiguous(), self.scale)
        newest = torch.tensor([b - 1 for _, b in spans], device=taps.device)
        return module.attended(x[newest], mixed[newest].to(x.dtype))

    def _cache(self) -> DenseLayer:
        return DenseLayer(self.shape, self.target.shape.dtype, self.target.shape.device)

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """See Drafter."""
        self._size = len(asked).bit_length()
        return [
            [Offer(self.name, self._sorts[: one.k], tells=True)]
            if one.number in self._states
            else []
            for one in asked
        ]

    @torch.inference_mode()
    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See Drafter. One pass for all."""
        if not asked:
            return []
        states = [self._states[one.number] for one in asked]
        self._came[self._size] = 0
        behind = [state for state in states if state.unread]
        if behind:
            self._catch_up(behind)
        contexts = torch.stack([state.context for state in states])
        newest = torch.tensor([one.tokens[-1] for one in asked], device=contexts.device)
        most, worth = max(one.k for one in asked), min(one.worth for one in asked)
        found, chances = self.guesses(contexts, newest, most, worth)
        drafts = []
        for one, tokens, sure in zip(asked, found.tolist(), chances.tolist(), strict=True):
            made = min(one.k, tokens.index(NONE) if NONE in tokens else most)
            # A module that makes NaN is sure of nothing.
            told = tuple(0.0 if math.isnan(chance) else chance for chance in sure[:made])
            drafts.append(Draft(tokens[:made], chances=told))
        return drafts

    def guesses(
        self, states: Tensor, newest: Tensor, most: int, worth: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The likeliest ``most`` tokens behind context vectors ``[n, hidden]`` and the token each
        was followed by, ``[n]``: int64 ``[n, most]``, and how likely each is, float32; NONE and 0
        where those before it are together less likely than ``worth``."""
        module, target = self.module, self.target
        entered = target.embed(newest).to(states.dtype)
        rows = len(states) * module.config.slots
        if self.fast is not None and native.few_rows(rows, self.head):
            return self.fast.forecast(states, newest, entered, most, worth)
        slots = module.slots(states, entered, most)
        scores = native.linear(target.final_norm(slots.flatten(0, 1)), self.head)
        scores = scores.view(len(states), most, -1)
        tokens, chances, before = [], [], newest
        stays = torch.ones(len(states), device=states.device)
        for slot in range(most):
            likely = scores[:, slot]
            if self.narrowed is not None:
                # Float32, which the fast products of few rows take.
                likely = likely + module.followers(self.narrowed[before].float())
            chance, best = likely.float().softmax(-1).max(-1)
            before = best if self.named is None else self.named[best]
            wanted = stays >= worth
            tokens.append(torch.where(wanted, before, NONE))
            chances.append(torch.where(wanted, chance, 0.0))
            stays = stays * chance
        return torch.stack(tokens, 1), torch.stack(chances, 1)

    def forget(self, number: int) -> None:
        """See Drafter."""
        self._states.pop(number, None)


class _State:
    """What is known of one sequence: ``cache`` of the tokens read, from its token number ``first``
    on, the hidden states of the ``waiting`` ones not yet read (rows, from and to, of tensors that
    sequences share), and the context vector of the newest one that was."""

    def __init__(self, cache: DenseLayer, first: int = 0) -> None:
        self.cache = cache
        self.first = first
        self.unread: list[tuple[Tensor, int, int]] = []
        self.waiting = 0
        self.context = torch.empty(0)


def _forecaster(drafter: SpecFormerDrafter) -> Forecaster | None:
    """The two kernels of a draft, where there are some for such a module and target."""
    module, config, norm = drafter.module, drafter.module.config, drafter.target.plain_norm
    if norm is None or native.library() is None or drafter.head.dtype is not torch.bfloat16:
        return None
    if config.heads // config.kv_heads > MAX_GROUP:
        return None

    def weight(layer: nn.Linear | None) -> Tensor | None:
        return None if layer is None else layer.weight

    def scale(layer: GroupedRMSNorm | None) -> Tensor | None:
        return None if layer is None else layer.weight.float()

    spread, bias = module.spread, module.slot_bias
    weights = {
        "fuse": weight(module.fuse),
        "context_qkv": weight(module.context.qkv),
        "context_out": weight(module.context.out),
        "spread": weight(spread),
        "spread_bias": None if spread is None else spread.bias.float(),
        "slot_bias": None if bias is None else bias.float(),
        "anchor": weight(module.anchor),
        "qkv": weight(module.between.qkv),
        "out": weight(module.between.out),
        "gate_up": weight(module.gate_up),
        "down": weight(module.down),
        "head": drafter.head,
        "after": weight(module.after),
        "narrowed": drafter.narrowed,
        "vocabulary": drafter.named,
        "fuse_norm": scale(module.fuse_norm),
        "context_norm": scale(module.context.norm),
        "spread_norm": scale(module.spread_norm),
        "token_norm": scale(module.token_norm),
        "slot_norm": scale(module.between.norm),
        "mlp_norm": scale(module.mlp_norm),
        "final_norm": norm[0],
        "cosine": drafter.cosine.float(),
        "sine": drafter.sine.float(),
    }
    sizes = {
        "groups": len(config.taps),
        "hidden": config.hidden_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "dim": config.head_dim,
        "slots": config.slots,
        "wide": config.intermediate_size,
        "named": len(drafter.head),
        "markov": config.markov,
        "causal": int(config.draft_attention == "causal"),
        "eps": config.eps,
        "final_eps": norm[1],
    }
    return Forecaster(weights, sizes)


def trained(target: FlatModel, **options: Any) -> SpecFormerDrafter:
    """The drafter of SpecFormerOptions for ``target``. Raises ConfigError if there is none for it
    or it is of another model, ModelError if it cannot be read."""
    chosen = SpecFormerOptions(**options)
    folder = chosen.folder or shipped_for(target)
    if folder is None:
        raise ConfigError(f"no drafter is shipped for {target.name}; see `narrows train`")
    return SpecFormerDrafter(SpecFormer.load(folder), target, chosen.recent)


def check_target(config: SpecFormerConfig, target: FlatModel) -> None:
    """Raises ConfigError unless a module of ``config`` was made for ``target``."""
    for what, own, theirs in (
        ("hidden size", config.hidden_size, target.shape.hidden_size),
        ("vocabulary", config.vocab_size, target.shape.vocab_size),
        ("last tapped state", config.taps[-1], len(target.shape.layers)),
        ("fingerprint", config.fingerprint, target.fingerprint),
    ):
        if own != theirs:
            raise ConfigError(
                f"this drafter belongs to another model than {target.name}: its {what} is "
                f"{own}, the model's {theirs}"
            )

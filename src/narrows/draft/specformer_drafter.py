"""Runs a trained SpecFormer beside an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from narrows.cache.dense import DenseLayer, DensePolicy
from narrows.contracts import Asked, Draft, Drafter, FlatBatch, LayerCache, LayerShape, Offer
from narrows.draft.specformer import SpecFormer, SpecFormerConfig
from narrows.errors import ConfigError
from narrows.model.flat import FlatModel
from narrows.ops import native


class SpecFormerDrafter(Drafter):
    """A trained module beside its target. Guesses are the likeliest tokens of the slots, each given
    the guess before it where the module looks at that.

    Raises ConfigError if the module belongs to another target.
    """

    name = "specformer"

    def __init__(self, module: SpecFormer, target: FlatModel) -> None:
        config = module.config
        check_target(config, target)
        self.target = target
        self.module = (
            module.to(target.shape.device, target.shape.dtype).eval().requires_grad_(False)
        )
        self.most, self.taps = config.slots, config.taps
        head = target.head
        self.named: Tensor | None = None
        if config.draft_vocab is not None:
            self.named = self.module.vocabulary.long()
            head = head[self.named]
        self.head = head.contiguous()
        self.scale = config.head_dim**-0.5
        self.layer = len(target.shape.layers)
        self.shape = LayerShape(config.kv_heads, config.head_dim, config.head_dim)
        with torch.inference_mode():
            self.narrowed = self.module.narrowed(target.embed(torch.arange(config.vocab_size)))
        every = torch.arange(target.shape.max_tokens, device=target.shape.device)
        self.cosine, self.sine = target.rotary(every)
        self._rows: Tensor | None = None
        self._states: dict[int, Tensor] = {}

    def build(self) -> list[LayerCache]:
        """See Drafter."""
        target = self.target.shape
        return [DenseLayer(self.shape, target.dtype, target.device)]

    def estimate(self, tokens: int) -> int:
        """See Drafter."""
        return DensePolicy().estimate(replace(self.target.shape, layers=(self.shape,)), tokens)

    @torch.inference_mode()
    def read(self, taps: Tensor, positions: Tensor, batch: FlatBatch) -> None:
        """See Drafter."""
        module = self.module
        x = module.fused(taps)
        cosine, sine = self.cosine[positions], self.sine[positions]
        q, k, v = module.queries(x, cosine, sine)
        mixed = batch.attend(self.layer, q.contiguous(), k.contiguous(), v.contiguous(), self.scale)
        self._rows = module.attended(x, mixed.to(x.dtype))

    def keep(self, numbers: Sequence[int], rows: Sequence[int]) -> None:
        """See Drafter."""
        assert self._rows is not None
        for number, row in zip(numbers, rows, strict=True):
            self._states[number] = self._rows[row].clone()
        self._rows = None

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """See Drafter."""
        return [[Offer(self.name, one.k)] if one.number in self._states else [] for one in asked]

    @torch.inference_mode()
    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See Drafter. One pass for all."""
        if not asked:
            return []
        states = torch.stack([self._states[one.number] for one in asked])
        newest = torch.tensor([one.tokens[-1] for one in asked], device=states.device)
        best = self.guesses(states, newest, max(one.k for one in asked)).tolist()
        return [Draft(row[: one.k]) for one, row in zip(asked, best, strict=True)]

    def guesses(self, states: Tensor, newest: Tensor, most: int) -> Tensor:
        """The likeliest ``most`` tokens behind context vectors ``[n, hidden]`` and the token each
        was followed by, ``[n]``: int64 ``[n, most]``."""
        module, target = self.module, self.target
        slots = module.slots(states, target.embed(newest).to(states.dtype), most)
        scores = native.linear(target.final_norm(slots.flatten(0, 1)), self.head)
        scores = scores.view(len(states), most, -1)
        found, before = [], newest
        for slot in range(most):
            likely = scores[:, slot]
            if self.narrowed is not None:
                likely = likely + module.followers(self.narrowed[before])
            best = likely.argmax(-1)
            before = best if self.named is None else self.named[best]
            found.append(before)
        return torch.stack(found, 1)

    def forget(self, number: int) -> None:
        """See Drafter."""
        self._states.pop(number, None)


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

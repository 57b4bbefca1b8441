"""A smaller language model as the drafter, one token after the other.

After Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), with
the smaller model's likeliest tokens as guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from narrows.cache.dense import DensePolicy
from narrows.config import Settings
from narrows.contracts import Asked, Draft, Drafter, FlatBatch, LayerCache, Offer, Sort
from narrows.errors import ConfigError
from narrows.model.flat import FlatModel

EXPECTED = 0.5, 0.6
"""Chances of the first guess and of later ones, to begin with."""


class SmallerOptions(Settings):
    """``name`` is a model as ``narrows.model.hub.resolve`` takes it; ``most`` tokens of a draft."""

    name: Annotated[str, Field(min_length=1)]
    most: Annotated[int, Field(ge=1, le=16)] = 4


class SmallerModel(Drafter):
    """Greedy guesses of ``model``, all sequences in one flat batch.

    Its caches are its own, not the engine's: they lag behind the target's by the tokens the target
    added itself. Raises ConfigError unless both models number the same tokens alike.
    """

    name = "model"

    def __init__(self, model: FlatModel, target: FlatModel, most: int = 4) -> None:
        _check_vocabulary(model, target)
        self.model, self.most = model, most
        self.policy = DensePolicy().holding(most)
        self._states: dict[int, _State] = {}
        self._sorts = Sort.by_place(*EXPECTED, most)

    def estimate(self, tokens: int) -> int:
        """See Drafter."""
        return self.policy.estimate(self.model.shape, tokens)

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """See Drafter. What it holds of sequences that are not asked about, which may have lost
        their place to others, is let go."""
        here = {one.number for one in asked}
        self._states = {n: s for n, s in self._states.items() if n in here}
        window = self.model.shape.max_tokens
        rooms = [min(one.k, self.most, window - len(one.tokens)) for one in asked]
        return [[Offer(self.name, self._sorts[:room])] if room > 0 else [] for room in rooms]

    @torch.inference_mode()
    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See Drafter. A pass over what is new, then one for each further guess."""
        states = [self._state(one) for one in asked]
        unread = [list(one.tokens[len(s.read) :]) for one, s in zip(asked, states, strict=True)]
        guesses: list[list[int]] = [[] for _ in asked]
        going = list(range(len(asked)))
        while going:
            best = self._read([states[i] for i in going], [unread[i] for i in going])
            for i, token in zip(going, best, strict=True):
                guesses[i].append(token)
                unread[i] = [token]
            going = [i for i in going if len(guesses[i]) < asked[i].k]
        return [Draft(one) for one in guesses]

    def _state(self, one: Asked) -> _State:
        """What has been read of a sequence, less the guesses that did not stay."""
        state = self._states.setdefault(one.number, _State(self.policy.build(self.model.shape)))
        # The newest token is read again if need be: its logits are what the draft begins with.
        end = min(len(state.read), len(one.tokens) - 1)
        start = max(0, end - self.most - 1)
        pairs = zip(state.read[start:end], one.tokens[start:end], strict=True)
        stays = next((start + i for i, (a, b) in enumerate(pairs) if a != b), end)
        for cache in state.caches:
            cache.rollback(len(state.read) - stays)
        del state.read[stays:]
        return state

    def _read(self, states: Sequence[_State], unread: Sequence[list[int]]) -> list[int]:
        """Read tokens of each sequence; the likeliest that follow."""
        ids: list[int] = []
        places: list[int] = []
        ends = []
        for state, tokens in zip(states, unread, strict=True):
            places += range(len(state.read), len(state.read) + len(tokens))
            ids += tokens
            ends.append(len(ids))
            state.read += tokens
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        device = self.model.shape.device
        hidden = self.model.hidden(
            torch.tensor(ids, device=device),
            torch.tensor(places, device=device),
            FlatBatch(spans, [state.caches for state in states]),
        )
        found: list[int] = self.model.best(hidden[[end - 1 for end in ends]])[1].tolist()
        return found

    def forget(self, number: int) -> None:
        """See Drafter."""
        self._states.pop(number, None)


class _State:
    """Caches of one sequence and the tokens in them."""

    def __init__(self, caches: list[LayerCache]) -> None:
        self.caches = caches
        self.read: list[int] = []


def smaller_model(target: FlatModel, **options: Any) -> SmallerModel:
    """A drafter of SmallerOptions, in the target's precision and place. Raises ConfigError, or
    ModelError if there is no such model."""
    chosen = SmallerOptions(**options)
    shape = target.shape
    precision = str(shape.dtype).removeprefix("torch.")
    model = FlatModel.load(chosen.name, dtype=precision, device=str(shape.device))
    return SmallerModel(model, target, chosen.most)


def _check_vocabulary(model: FlatModel, target: FlatModel) -> None:
    same = model.shape.vocab_size == target.shape.vocab_size
    if same and model.tokenizer is not None and target.tokenizer is not None:
        same = model.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    if not same:
        raise ConfigError(
            f"{model.name} cannot draft for {target.name}: they number tokens differently"
        )

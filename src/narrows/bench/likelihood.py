"""How likely a model finds a gold answer: the measure that a weak model's text cannot give."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from narrows.cache.dense import DensePolicy
from narrows.errors import InputError
from narrows.model.flat import FlatModel


def prompt_ids(model: FlatModel, prompt: str) -> list[int]:
    """Token ids of a prompt, with the special tokens the tokenizer adds by itself."""
    ids: list[int] = model.tokenizer(prompt, verbose=False)["input_ids"]
    return ids


def answer_ids(model: FlatModel, answer: str) -> list[int]:
    """Token ids of an answer, to be put behind a prompt's."""
    ids: list[int] = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids


class Reader:
    """Reads prompts with one model, and not again what a prompt shares with the one before it."""

    def __init__(self, model: FlatModel) -> None:
        self.model = model
        self._read: list[int] = []
        self._caches = DensePolicy().build(model.shape)
        # A sliding layer has freed what a long rollback would bring back.
        self._forgets = any(layer.window for layer in model.shape.layers)

    def answer_nll(self, prompt: list[int], answer: list[int]) -> float:
        """Mean of ``-ln p(token | prompt, tokens before it)`` over the answer's tokens, in nats.

        Dense caches, logits of the answer's rows only. Raises InputError if either is empty or
        both together exceed the model's window.
        """
        model, window = self.model, self.model.shape.max_tokens
        if not prompt or not answer:
            raise InputError("an answer's likelihood needs a prompt and an answer, each not empty")
        if len(prompt) + len(answer) > window:
            raise InputError(
                f"prompt and answer have {len(prompt)} + {len(answer)} tokens but {model.name} "
                f"takes {window}; lower the token budget"
            )
        wanted = prompt + answer[:-1]
        start = self._keep(wanted, len(prompt) - 1)
        with torch.inference_mode():
            states = model.read(wanted[start:], self._caches)
            self._read = wanted
            logits = model.logits(states[len(prompt) - 1 - start :])
            return float(cross_entropy(logits, torch.tensor(answer, device=states.device)))

    def _keep(self, wanted: list[int], most: int) -> int:
        """Take back what was read but is not ``wanted``; returns how many tokens stay, at most
        ``most``."""
        pairs = zip(self._read, wanted[:most], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._read), most))
        surplus, self._read = len(self._read) - shared, []
        if not shared or self._forgets:
            self._caches = DensePolicy().build(self.model.shape)
            return 0
        for cache in self._caches:
            cache.rollback(surplus)
        return shared


def answer_nll(model: FlatModel, prompt: list[int], answer: list[int]) -> float:
    """One answer's likelihood; see ``Reader``."""
    return Reader(model).answer_nll(prompt, answer)

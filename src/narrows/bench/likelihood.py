"""How likely a model finds a gold answer: the measure that a weak model's text cannot give."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from narrows.cache.dense import DensePolicy
from narrows.contracts import FlatBatch
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


def answer_nll(model: FlatModel, prompt: list[int], answer: list[int]) -> float:
    """Mean of ``-ln p(token | prompt, tokens before it)`` over the answer's tokens, in nats.

    One flat pass over prompt and answer with dense caches, logits of the answer's rows only.
    Raises InputError if either is empty or both together exceed the model's window.
    """
    window = model.shape.max_tokens
    if not prompt or not answer:
        raise InputError("the likelihood of an answer needs a prompt and an answer, each not empty")
    if len(prompt) + len(answer) > window:
        raise InputError(
            f"prompt and answer have {len(prompt)} + {len(answer)} tokens but {model.name} takes "
            f"{window}; lower the token budget"
        )
    device = model.shape.device
    read = torch.tensor(prompt + answer[:-1], device=device)
    batch = FlatBatch([(0, len(read))], [DensePolicy().build(model.shape)])
    with torch.inference_mode():
        states = model.hidden(read, torch.arange(len(read), device=device), batch)
        logits = model.logits(states[len(prompt) - 1 :])
        return float(cross_entropy(logits, torch.tensor(answer, device=device)))

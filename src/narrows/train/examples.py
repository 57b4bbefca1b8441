"""What a drafter learns from: prompts with the answers its own target gave (sheet 5.1), or, to see
what that is worth, with others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from narrows.config import SamplingParams
from narrows.errors import InputError
from narrows.llm import LLM
from narrows.train.kept import Tensors, kept

ANSWERS = Path("work", "answers")
"""In a drafter's folder, what its target answered."""
PART = 256
"""Prompts answered together and kept in one file: many, since the last answers of a part
are written by few at a time."""
SHORTEST = 4
"""Tokens of an answer below which nothing can be learnt from it."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt in the model's chat template and of the answer, which starts at
    ``start``."""

    tokens: list[int]
    start: int


def answer_all(
    llm: LLM,
    prompts: Sequence[str],
    folder: Path,
    *,
    max_tokens: int = 256,
    longest: int = 1024,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Example]:
    """Greedy answers of ``llm`` to every prompt, kept in ``folder`` part by part, so that a run
    that was stopped goes on. Prompts that leave no room for an answer in ``longest`` tokens are
    left out.

    Raises InputError if ``folder`` holds another run's parts, ModelError if one is damaged.
    """
    examples = []
    for first in range(0, len(prompts), PART):
        path = folder / f"part-{first // PART:05d}.safetensors"
        some = prompts[first : first + PART]
        origin = _origin(llm, some, max_tokens, longest)
        make = partial(_answered, llm, some, max_tokens, longest)
        examples += _unpacked(kept(path, origin, make))
        on_done(len(some))
    if not examples:
        raise InputError(f"no prompt is short enough to be answered in {longest} tokens")
    return examples


def given_all(
    llm: LLM, prompts: Sequence[str], answers: Sequence[str], *, longest: int = 1024
) -> list[Example]:
    """Every prompt with the answer somebody gave to it, and the token that ends the target's own.
    What is longer than ``longest`` tokens is left out, as are answers nothing can be learnt from.
    Raises InputError if nothing is left."""
    end = sorted(llm.model.eos_ids)[:1]
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = llm.chat_ids([{"role": "user", "content": prompt}])
        told = [*llm.encode(answer), *end]
        if len(told) >= SHORTEST and len(ids) + len(told) <= longest:
            examples.append(Example([*ids, *told], len(ids)))
    if not examples:
        raise InputError(f"no prompt and its answer are short enough for {longest} tokens")
    return examples


def digest(texts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that tell lists of texts apart."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _origin(llm: LLM, prompts: Sequence[str], max_tokens: int, longest: int) -> str:
    return f"{llm.model.fingerprint} {digest(prompts)} {max_tokens} {longest}"


def _answered(llm: LLM, prompts: Sequence[str], max_tokens: int, longest: int) -> Tensors:
    asked = [llm.chat_ids([{"role": "user", "content": p}]) for p in prompts]
    asked = [ids for ids in asked if len(ids) + SHORTEST <= longest]
    requests = [
        llm.submit(ids, SamplingParams(max_tokens=min(max_tokens, longest - len(ids))))
        for ids in asked
    ]
    for _ in llm.engine.run():
        pass
    return _packed(
        [
            Example([*ids, *request.generated], len(ids))
            for ids, request in zip(asked, requests, strict=True)
            if len(request.generated) >= SHORTEST
        ]
    )


def _packed(examples: list[Example]) -> Tensors:
    return {
        "tokens": torch.tensor([t for e in examples for t in e.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(e.tokens) for e in examples], dtype=torch.int32),
        "starts": torch.tensor([e.start for e in examples], dtype=torch.int32),
    }


def _unpacked(tensors: Tensors) -> list[Example]:
    tokens, lengths, starts = (tensors[name].tolist() for name in ("tokens", "lengths", "starts"))
    examples, at = [], 0
    for length, start in zip(lengths, starts, strict=True):
        examples.append(Example(tokens[at : at + length], start))
        at += length
    return examples

"""What a drafter learns from: prompts with the answers its own target gave (sheet 5.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from narrows.config import SamplingParams
from narrows.errors import InputError, ModelError
from narrows.files import replacing
from narrows.llm import LLM

PART = 64
"""Prompts answered in one batch and kept in one file."""
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
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for first in range(0, len(prompts), PART):
        path = folder / f"part-{first // PART:05d}.safetensors"
        some = prompts[first : first + PART]
        origin = _origin(llm, some, max_tokens, longest)
        if not path.exists():
            _write(path, _answer(llm, some, max_tokens, longest), origin)
        examples += _read(path, origin)
        on_done(len(some))
    if not examples:
        raise InputError(f"no prompt is short enough to be answered in {longest} tokens")
    return examples


def digest(prompts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that tell lists of prompts apart."""
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]


def _origin(llm: LLM, prompts: Sequence[str], max_tokens: int, longest: int) -> str:
    return f"{llm.model.fingerprint} {digest(prompts)} {max_tokens} {longest}"


def _answer(llm: LLM, prompts: Sequence[str], max_tokens: int, longest: int) -> list[Example]:
    asked = [llm.chat_ids([{"role": "user", "content": p}]) for p in prompts]
    asked = [ids for ids in asked if len(ids) + SHORTEST <= longest]
    requests = [
        llm.submit(ids, SamplingParams(max_tokens=min(max_tokens, longest - len(ids))))
        for ids in asked
    ]
    for _ in llm.engine.run():
        pass
    return [
        Example([*ids, *request.generated], len(ids))
        for ids, request in zip(asked, requests, strict=True)
        if len(request.generated) >= SHORTEST
    ]


def _write(path: Path, examples: list[Example], origin: str) -> None:
    tokens = torch.tensor([t for e in examples for t in e.tokens], dtype=torch.int32)
    lengths = torch.tensor([len(e.tokens) for e in examples], dtype=torch.int32)
    starts = torch.tensor([e.start for e in examples], dtype=torch.int32)
    tensors = {"tokens": tokens, "lengths": lengths, "starts": starts}
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"origin": origin})


def _read(path: Path, origin: str) -> list[Example]:
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get("origin")
            tokens, lengths, starts = (
                file.get_tensor(name).tolist() for name in ("tokens", "lengths", "starts")
            )
    except Exception as error:
        raise ModelError(f"{path} is damaged ({error}); delete it to make it again") from None
    if told != origin:
        raise InputError(
            f"{path} was made by another model, from other prompts or with other lengths; give "
            "another folder"
        )
    examples, at = [], 0
    for length, start in zip(lengths, starts, strict=True):
        examples.append(Example(tokens[at : at + length], start))
        at += length
    return examples

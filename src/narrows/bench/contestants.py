"""The engines that ``narrows bench engine`` times side by side, behind one call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from narrows.config import SamplingParams
from narrows.engine.engine import Step
from narrows.errors import ConfigError
from narrows.llm import LLM
from narrows.model import hub
from narrows.model.flat import DTYPES
from narrows.model.pretrained import weights_from_folder

Prompts = Sequence[list[int]]


@dataclass(slots=True)
class Timing:
    """One batch: seconds in all, seconds of each step that only decoded, for every prompt one
    token, and the tokens written."""

    total_s: float
    tokens: list[list[int]]
    steps_s: list[float] = field(default_factory=list)


class Contestant(Protocol):
    """An engine with a model loaded."""

    name: str

    def generate(self, prompts: Prompts, new_tokens: int) -> Timing:
        """Continue each prompt greedily by exactly ``new_tokens`` tokens."""


class Ours:
    """This package's engine, without drafting."""

    def __init__(self, model: str, dtype: str, device: str | None, cache: str) -> None:
        self.name = "narrows" if cache == "dense" else f"narrows {cache}"
        self.llm = LLM(model, dtype=dtype, device=device, cache=cache, draft="none")

    def generate(self, prompts: Prompts, new_tokens: int) -> Timing:
        """See Contestant."""
        steps: list[float] = []

        def note(step: Step) -> None:
            if step.prompt_tokens == 0 and step.generated_tokens == len(prompts):
                steps.append(step.seconds)

        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        started = time.perf_counter()
        done = self.llm.generate(list(prompts), params, on_step=note)
        if new_tokens > 2 and not steps:
            raise ConfigError(
                f"new_tokens {new_tokens} are written before all {len(prompts)} prompts are read, "
                "so no step decodes them all; give more"
            )
        return Timing(time.perf_counter() - started, [c.token_ids for c in done], steps)


class Transformers:
    """``generate`` of transformers with its own attention and cache, prompts padded on the left.
    ``lookup`` is its own prompt lookup, of so many tokens a draft, for one prompt at a time."""

    name = "transformers"

    def __init__(
        self, model: str, dtype: str, device: str | None, lookup: int | None = None
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.more = {}
        if lookup is not None:
            self.name = f"{self.name} lookup"
            self.more = {"prompt_lookup_num_tokens": lookup}
        loaded = weights_from_folder(AutoModelForCausalLM, hub.resolve(model), dtype=DTYPES[dtype])
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = loaded.to(place).eval()
        # Every engine writes the same number of tokens; an early end would not be a fair time.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(self, prompts: Prompts, new_tokens: int) -> Timing:
        """See Contestant."""
        clock = _Clock()
        width = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        started = time.perf_counter()
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=[clock],
            **self.more,
        )
        tokens: list[list[int]] = out[:, width:].tolist()
        total = time.perf_counter() - started
        return Timing(total, tokens, [b - a for a, b in zip(clock.at, clock.at[1:], strict=False)])


class _Clock:
    """A stopping rule that never stops and notes when each token was ready."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        self.at.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

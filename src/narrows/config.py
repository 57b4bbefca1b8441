"""Settings a user gives, typed and checked once. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from narrows.errors import ConfigError


class Settings(BaseModel):
    """Frozen base; a bad value raises ConfigError with one line that names the field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"]) or type(self).__name__
            given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
            raise ConfigError(f"{where}: {first['msg']}{given}") from None

    def spec(self, name: str, usual: Self) -> str:
        """``name`` and, behind a colon, the fields that differ from ``usual``: the spec string
        that says the same, see ``registry.split_spec``."""
        changed = {k: v for k, v in self.model_dump().items() if v != getattr(usual, k)}
        told = ",".join(f"{k}={v}" for k, v in changed.items())
        return f"{name}:{told}" if told else name


class SamplingParams(Settings):
    """How one request picks its tokens. Names and meanings are those of vLLM's class.

    ``temperature`` 0 is greedy. ``top_k`` 0 means no limit. ``seed`` None draws a fresh one.
    ``logit_bias`` is added to the scores of single tokens; -100 all but bans one.
    ``stop`` strings end the text and are left out of it. ``logprobs`` n returns the n best
    log-probabilities (after penalties and bias, before temperature and truncation) beside the
    sampled token's.
    """

    max_tokens: Annotated[int, Field(ge=1)] = 256
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict
    )
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_stop_string(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("stop"), str):
            return {**data, "stop": (data["stop"],)}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(not s for s in self.stop):
            raise ValueError("a stop string must not be empty")
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must not exceed max_tokens")
        return self


class EngineConfig(Settings):
    """Limits of one engine.

    ``cache_bytes`` bounds the key/value bytes of all running sequences; None takes
    ``cache_share`` of the memory that is free when the engine starts. ``prefill_chunk`` is the
    most prompt tokens read in one step, beside every running sequence's next token.
    ``draft_tokens`` is how many of a drafter's guesses a step verifies of each sequence; None
    chooses, step by step, what is fastest.
    """

    cache_bytes: Annotated[int, Field(ge=1)] | None = None
    cache_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    max_sequences: Annotated[int, Field(ge=1)] = 256
    prefill_chunk: Annotated[int, Field(ge=1)] = 512
    draft_tokens: Annotated[int, Field(ge=0)] | None = None

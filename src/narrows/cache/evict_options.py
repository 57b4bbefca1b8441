"""What an eviction policy can be told, and the scorer that this comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from narrows.cache import scores
from narrows.cache.budget import Heads, Schedule
from narrows.cache.scores import Scorer
from narrows.config import Settings
from narrows.contracts import ModelShape
from narrows.errors import ConfigError

STEP = 8
"""Evicting again frees one in so many tokens at once, since it copies those that stay."""

SINKS = 4
"""First tokens that stay, at least, when tokens are evicted again by their age."""

ScorerName = Literal[
    "window",
    "accumulated",
    "expected",
    "reconstruction",
    "key_norm",
    "key_difference",
    "recency",
    "random",
]


class EvictOptions(Settings):
    """Options of the eviction policies.

    ``keep`` is the share of the prompt's tokens that stays, on average over layers. The newest
    ``window`` tokens and the first ``sinks`` are among them. ``recent`` is the share of a layer's
    tokens that goes to the newest ones, if that is more than ``window``. ``score`` names a scorer
    of ``cache.scores``; ``score_norm``, ``pool`` and ``pool_kernel`` are of those that read
    attention. ``target_bytes`` takes the place of ``keep``: what a prompt leaves takes at most so
    many bytes in all full-attention layers. ``schedule`` and ``beta``, ``heads``, ``adaptive`` and
    ``floor`` are explained in ``cache.budget``. ``seed`` is of the random scorer. ``cap`` is how
    many tokens a KV head may hold (0: any number), see ``evict_layer.EvictLayer``; ``hold`` tokens
    can be rolled back over an eviction that it made necessary.
    """

    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    target_bytes: Annotated[int, Field(ge=0)] = 0
    score: ScorerName = "window"
    window: Annotated[int, Field(ge=1)] = 32
    sinks: Annotated[int, Field(ge=0)] = 0
    recent: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    score_norm: Literal["window", "eq2"] = "window"
    pool: Literal["none", "avg", "max"] = "none"
    pool_kernel: Annotated[int, Field(ge=1)] = 7
    schedule: Schedule = "flat"
    beta: Annotated[float, Field(gt=0.0)] = 0.05
    heads: Heads = "union"
    adaptive: bool = False
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    seed: int = 0
    cap: Annotated[int, Field(ge=0)] = 0
    hold: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pool_kernel % 2 == 0:
            raise ValueError("pool_kernel must be odd")
        if self.adaptive and self.heads not in ("mean", "max"):
            raise ValueError(f"adaptive needs heads=mean or max, not {self.heads}")
        if self.schedule == "pyramid" and self.beta >= 1:
            raise ValueError("beta must be below 1 with schedule=pyramid")
        if self.schedule == "pyramidkv" and self.beta < 1:
            raise ValueError("beta must be at least 1 with schedule=pyramidkv")
        least = max(self.sinks, SINKS) + self.newest
        if self.cap and self.thinned_to < least:
            raise ValueError(
                f"cap must leave room for the {least} first and newest tokens, which always stay, "
                f"when an eighth of it is freed: at least {-(-least * STEP // (STEP - 1))}"
            )
        if self.cap and self.hold > self.cap - self.thinned_to:
            raise ValueError("hold must not exceed an eighth of cap")
        return self

    @property
    def newest(self) -> int:
        """Newest tokens that are never evicted again."""
        return self.window

    @property
    def thinned_to(self) -> int:
        """Tokens of a head that are left of ``cap``."""
        return self.cap * (STEP - 1) // STEP

    @property
    def settles(self) -> bool:
        """Whether tokens read later can change how earlier ones are held."""
        return self.cap > 0


def make_scorer(options: EvictOptions, shape: ModelShape, place: int) -> Scorer:
    """A scorer for layer number ``place``. Raises ConfigError if the model cannot be scored so."""
    if options.keep == 1 and not options.target_bytes and not options.cap:
        return scores.Recency()  # nothing will be dropped, so nothing need be looked at
    if options.score == "window":
        return scores.WindowAttention(
            options.window, options.score_norm, options.pool, options.pool_kernel
        )
    if options.score == "accumulated":
        return scores.AccumulatedAttention(options.score_norm)
    if options.score == "expected":
        if shape.rotary is None:
            raise ConfigError("score=expected needs a loaded model's rotary tables")
        return scores.ExpectedAttention(shape.rotary, options.sinks)
    return key_scorer(options, place) or scores.Reconstruction()


def key_scorer(options: EvictOptions, number: int) -> Scorer | None:
    """The scorer, if it needs nothing but the tokens to be rated; ``number`` is the layer's."""
    if options.score == "random":
        return scores.Chance(options.seed * 1009 + number)
    plain: dict[str, Callable[[], Scorer]] = {
        "key_norm": scores.KeyNorm,
        "key_difference": scores.KeyDifference,
        "recency": scores.Recency,
    }
    made = plain.get(options.score)
    return None if made is None else made()

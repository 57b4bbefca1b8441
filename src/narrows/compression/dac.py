"""DAC: dynamic attention-aware prompt compression (Zhao et al., ACL 2025, arXiv:2507.11942).

Tokens that surprise a small model, and tokens it attends to, are kept. Deleting tokens changes
the surprisal of those left, so deletion goes in stages and each stage scores what is left anew.
Differences from the released code are in budgets only: every stage meets its share exactly.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from narrows.compression import diagnostics
from narrows.compression.attn_norm import AttnNorm
from narrows.compression.base import Choice, Prepared, UnitCompressor
from narrows.compression.chunks import chunk_breaks
from narrows.compression.score import Scorer
from narrows.compression.select import max_apart, stage_targets
from narrows.compression.stages import keep_apart, keep_best, keep_shares
from narrows.compression.units import Pooling, Units, pool
from narrows.config import Settings
from narrows.errors import ConfigError

if TYPE_CHECKING:
    from narrows.model.flat import FlatModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

COMMON = ("tokenizer", "protect", "granularity", "on_infeasible", "target_tokenizer")
"""UnitCompressor's options."""
FLAT = 1e-8
"""A signal that varies less than this over a text counts as constant."""


class DacOptions(Settings):
    """How DAC scores and deletes. Defaults are the paper's (its released code's, where it is
    silent), but for chunks, which the paper does not have.

    ``fusion`` "additive" is (1 - alpha) * surprisal + alpha * attention, both scaled to [0, 1];
    "multiplicative" their plain product. ``stages`` None means one per 100 tokens, 1 to 15;
    ``dynamic`` False means one. ``adjacent`` False forbids deleting neighbours within a stage
    and raises the number of stages where that needs it. ``attn_refresh`` "once" keeps the first
    stage's attention. ``chunk_policy`` "proportional" deletes the same share of every chunk,
    "global" compares tokens across chunks. ``clip_quantile`` cuts attention outliers before
    scaling. ``pool`` makes a unit's score of its tokens'. ``diagnose`` adds diagnostics to the
    report. The rest are ``Scorer``'s.
    """

    fusion: Literal["additive", "multiplicative"] = "additive"
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8
    stages: Annotated[int, Field(ge=1)] | None = None
    dynamic: bool = True
    adjacent: bool = True
    attn_refresh: Literal["stage", "once"] = "stage"
    chunk_policy: Literal["global", "proportional"] = "global"
    clip_quantile: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    pool: Pooling = "mean"
    diagnose: bool = False
    attn_norm: AttnNorm = "sum"
    chunk_tokens: Annotated[int, Field(ge=0)] = 1024
    left_context: Annotated[int, Field(ge=0)] = 64
    prepend_bos: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.dynamic and self.stages not in (None, 1):
            raise ValueError("stages needs dynamic=True")
        if self.chunk_policy == "proportional" and not self.adjacent:
            raise ValueError("chunk_policy='proportional' needs adjacent=True")
        return self

    def planned_stages(self, tokens: int, free: int, budget: int, most: float) -> int:
        """Stages to plan for a text of ``tokens`` of which ``free`` shrink to ``budget``, where a
        stage may delete at most the share ``most`` of what is free."""
        stages = self.stages or (min(max(1, tokens // 100), 15) if self.dynamic else 1)
        if most >= 1.0 or free <= budget:
            return stages
        needed = math.log(max(1, budget) / free) / math.log(1.0 - most)
        return max(stages, math.ceil(needed - 1e-9))

    @property
    def needs_attention(self) -> bool:
        """Whether attention has any part in the score."""
        return self.fusion == "multiplicative" or self.alpha > 0.0


class DAC(UnitCompressor):
    """Surprisal and received attention, fused, in stages.

    Args:
        model: the scoring model.
        options: fields of DacOptions, and UnitCompressor's own options.

    Raises:
        ConfigError: without a model, or for a bad option.
    """

    method: ClassVar[str] = "dac"
    preset: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: FlatModel | None, **options: Any) -> None:
        if model is None:
            raise ConfigError(f"method {self.method!r} needs a model to score with")
        common = {k: options.pop(k) for k in COMMON if k in options}
        super().__init__(model, **common)
        self.options = DacOptions(**{**self.preset, **options})
        self.scorer = Scorer(
            model,
            chunk_tokens=self.options.chunk_tokens,
            left_context=self.options.left_context,
            prepend_bos=self.options.prepend_bos,
            attn_norm=self.options.attn_norm,
        )

    def settings(self) -> dict[str, Any]:
        """See UnitCompressor."""
        return {
            **super().settings(),
            **self.options.model_dump(exclude={"diagnose"}),
            "model": self.scorer.model.name,
        }

    def choose(self, prepared: Prepared, question: str | None) -> Choice:
        """See UnitCompressor. ``question`` has no part in it. The text's first token is kept if
        it fits. A deleted token's score is that of the stage that deleted it."""
        state = _State.of(prepared)
        free, budget = state.left, prepared.budget - int(state.costs[state.fixed].sum())
        most = 1.0 if self.options.adjacent else state.most_apart
        planned = self.options.planned_stages(len(state.scores), free, budget, most)
        for target in stage_targets(free, budget, planned):
            while state.left > target:
                self._stage(state, target)
        return Choice(state.kept, state.scores, self._report(state, prepared))

    def _stage(self, state: _State, target: int) -> None:
        """Score what is left and delete until ``target`` tokens of the free units remain."""
        started = time.perf_counter()
        units = np.flatnonzero(state.kept)
        tokens = state.tokens()
        scored = self.scorer.score(
            [state.ids[t] for t in tokens],
            state.breaks[tokens],
            attention=self.options.needs_attention and state.attention is None,
        )
        attention = scored.attention
        if state.attention is not None:
            attention = state.attention[tokens]
        elif attention is not None and self.options.attn_refresh == "once":
            state.attention = attention  # the first stage's tokens are all tokens
        fused = fuse(scored.surprisal, attention, self.options)
        state.scores[tokens] = fused
        costs = state.costs[units]
        bounds = np.concatenate([[0], np.cumsum(costs)])
        pooled = pool(Units(bounds), fused, self.options.pool)
        chunk = np.searchsorted([b for _, b in scored.chunks], bounds[:-1], side="right")
        free = ~state.fixed[units]
        state.kept[units] = ~free | self._keep(pooled, costs, free, target, chunk)
        state.log.append(
            {
                "target": int(state.costs[state.fixed].sum()) + target,
                "kept": int(state.costs[state.kept].sum()),
                "seconds": time.perf_counter() - started,
                **self._diagnose(state, tokens, scored.surprisal, attention),
            }
        )

    def _keep(self, scores: Floats, costs: Ints, free: Mask, budget: int, chunk: Ints) -> Mask:
        if not self.options.adjacent:
            return keep_apart(scores, costs, free, budget)
        if self.options.chunk_policy == "proportional":
            return keep_shares(scores, costs, free, budget, chunk)
        return keep_best(scores, costs, free, budget)

    def _diagnose(
        self, state: _State, tokens: Ints, surprisal: Floats, attention: Floats | None
    ) -> dict[str, Any]:
        """A stage's own diagnostics: of its scores, and of how its surprisal differs from that
        of the stage before."""
        if not self.options.diagnose:
            return {}
        found: dict[str, Any] = {}
        if state.surprisal is not None:
            before = state.surprisal[tokens[1:]]
            found["entropy_shift"] = diagnostics.entropy_shift(before, surprisal[1:])
        state.surprisal = np.zeros(len(state.scores))
        state.surprisal[tokens] = surprisal
        if attention is not None:
            a, i = attention[1:], surprisal[1:]
            found["pearson"] = diagnostics.pearson(a, i)
            found["spearman"] = diagnostics.spearman(a, i)
            if self.options.fusion == "additive":
                found["effective_attention_weight"] = diagnostics.effective_weight(
                    scaled(clipped(a, self.options.clip_quantile)), scaled(i), self.options.alpha
                )
        return found

    def _report(self, state: _State, prepared: Prepared) -> dict[str, Any]:
        warnings = []
        if not state.fixed[0]:
            warnings.append("the first token does not fit beside the protected text")
        asked = self.options.stages or (None if self.options.dynamic else 1)
        if asked is not None and len(state.log) > asked:
            warnings.append(
                f"{len(state.log)} stages instead of {asked}: fewer cannot delete this much "
                "without deleting neighbours"
            )
        report: dict[str, Any] = {
            "stages": state.log,
            "stages_used": len(state.log),
            "warnings": warnings,
        }
        if self.options.diagnose:
            report["diagnostics"] = diagnostics.of_choice(
                np.repeat(state.kept, state.costs),
                np.repeat(prepared.forced, state.costs),
                prepared.budget,
                self.scorer.model.shape.device,
            )
        return report


@dataclass(slots=True)
class _State:
    """What is left of a text between stages. ``fixed`` units are never deleted; ``attention`` and
    ``surprisal`` ``[n]`` are remembered from earlier stages where that is asked for."""

    ids: list[int]
    breaks: NDArray[np.int8]
    costs: Ints
    fixed: Mask
    kept: Mask
    scores: Floats
    attention: Floats | None = None
    surprisal: Floats | None = None
    log: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, prepared: Prepared) -> _State:
        costs = prepared.units.costs
        fixed = prepared.forced.copy()
        fixed[0] |= costs[0] + costs[fixed].sum() <= prepared.budget
        return cls(
            prepared.tokens.ids,
            chunk_breaks(prepared.tokens, prepared.units),
            costs,
            fixed,
            np.ones(len(costs), dtype=bool),
            np.zeros(len(prepared.tokens.ids)),
        )

    @property
    def left(self) -> int:
        """Tokens of free units still there."""
        return int(self.costs[self.kept & ~self.fixed].sum())

    @property
    def most_apart(self) -> float:
        """The largest share of the free units that can go without neighbours among them."""
        free = ~self.fixed
        return max_apart(free) / max(1, int(free.sum()))

    def tokens(self) -> Ints:
        """Indices of the tokens still there."""
        return np.flatnonzero(np.repeat(self.kept, self.costs))


def fuse(surprisal: Floats, attention: Floats | None, options: DacOptions) -> Floats:
    """One score a token, float64 ``[n]``. The first token, which nothing predicts, scores 0 and
    has no part in the scaling. ``attention`` may be None where it has no weight."""
    fused = np.zeros(len(surprisal))
    shock = surprisal[1:]
    if attention is None:
        fused[1:] = scaled(shock)
        return fused
    heed = clipped(attention[1:], options.clip_quantile)
    if options.fusion == "multiplicative":
        fused[1:] = shock * heed
    else:
        fused[1:] = (1.0 - options.alpha) * scaled(shock) + options.alpha * scaled(heed)
    return fused


def scaled(values: Floats) -> Floats:
    """Min-max scaled to [0, 1]; a constant becomes all zeros."""
    if not len(values) or np.ptp(values) <= FLAT:
        return np.zeros(len(values))
    return np.asarray((values - values.min()) / np.ptp(values))


def clipped(values: Floats, quantile: float | None) -> Floats:
    """Values above the quantile brought down to it."""
    if quantile is None or not len(values):
        return values
    return np.minimum(values, np.quantile(values, quantile))


def _preset(name: str, what: str, **options: Any) -> type[DAC]:
    """DAC under another name with other defaults."""
    return type(name, (DAC,), {"method": name, "preset": options, "__doc__": what})


dac = DAC
dac_multiplicative = _preset(
    "dac-multiplicative", "DAC with the product of both signals.", fusion="multiplicative"
)
dac_static = _preset("dac-static", "DAC in one stage.", dynamic=False)
dac_apart = _preset("dac-apart", "DAC that never deletes neighbours in one stage.", adjacent=False)
surprisal_dynamic = _preset("surprisal-dynamic", "Surprisal alone, in stages.", alpha=0.0)

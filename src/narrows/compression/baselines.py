"""The simple rivals: chance, truncation, and surprisal alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from narrows.compression.base import Choice, Prepared, UnitCompressor
from narrows.compression.score import Scorer
from narrows.compression.stages import keep_best
from narrows.compression.units import Granularity, pool
from narrows.errors import ConfigError

if TYPE_CHECKING:
    from narrows.model.flat import FlatModel


def keep_forced_and_best(prepared: Prepared, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Forced units and, in what they leave of the budget, those of highest score: bool
    ``[units]`` from ``scores`` ``[units]``. Ties keep the earlier unit."""
    free = ~prepared.forced
    return prepared.forced | keep_best(scores, prepared.units.costs, free, prepared.free)


class Random(UnitCompressor):
    """Keeps units by lot. The same text, budget and ``seed`` give the same result."""

    method = "random"

    def __init__(self, model: FlatModel | None = None, *, seed: int = 0, **options: Any) -> None:
        super().__init__(model, **options)
        if seed < 0:
            raise ConfigError(f"seed must not be negative (given: {seed})")
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        """See UnitCompressor."""
        return {**super().settings(), "seed": self.seed}

    def choose(self, prepared: Prepared, question: str | None) -> Choice:
        """See UnitCompressor."""
        lots = np.random.default_rng(self.seed).random(len(prepared.units))
        return Choice(keep_forced_and_best(prepared, lots))


class Truncate(UnitCompressor):
    """Keeps one or two ends of the text. Protected units elsewhere survive too."""

    at_head: ClassVar[bool]
    at_tail: ClassVar[bool]

    def choose(self, prepared: Prepared, question: str | None) -> Choice:
        """See UnitCompressor. Stops at the first unit that does not fit, so that what is kept
        of the free units is a run at each end and no more."""
        bounds, costs = prepared.units.bounds, prepared.units.costs
        before, after = bounds[:-1], bounds[-1] - bounds[1:]
        if self.at_head and self.at_tail:
            distance = np.minimum(before, after)
        else:
            distance = before if self.at_head else after
        free = np.flatnonzero(~prepared.forced)
        nearest = free[np.argsort(distance[free], kind="stable")]
        kept = prepared.forced.copy()
        kept[nearest[np.cumsum(costs[nearest]) <= prepared.free]] = True
        return Choice(kept)


class TruncateHead(Truncate):
    """Keeps the beginning."""

    method = "head"
    at_head, at_tail = True, False


class TruncateTail(Truncate):
    """Keeps the end."""

    method = "tail"
    at_head, at_tail = False, True


class TruncateMiddle(Truncate):
    """Cuts the middle out: half of the budget goes to the beginning, half to the end."""

    method = "head-tail"
    at_head, at_tail = True, True


class SelectiveContext(UnitCompressor):
    """Keeps the units of highest mean surprisal, measured once on the whole text.

    After Li et al., "Compressing Context to Enhance Inference Efficiency of Large Language
    Models" (2023), with an exact budget in place of the paper's percentile.

    Args:
        model: the scoring model.
        granularity: the paper's units are phrases; tokens and sentences are its variants.
        chunk_tokens: see ``Scorer``.
        prepend_bos: see ``Scorer``; without it the first token counts as no surprise.
        options: see ``UnitCompressor``.
    """

    method = "selective-context"

    def __init__(
        self,
        model: FlatModel | None = None,
        *,
        granularity: Granularity = "phrase",
        chunk_tokens: int = 1024,
        prepend_bos: bool = False,
        **options: Any,
    ) -> None:
        if model is None:
            raise ConfigError(f"method {self.method!r} needs a model")
        super().__init__(model, granularity=granularity, **options)
        self.scorer = Scorer(model, chunk_tokens=chunk_tokens, prepend_bos=prepend_bos)

    def settings(self) -> dict[str, Any]:
        """See UnitCompressor."""
        return {
            **super().settings(),
            "model": self.scorer.model.name,
            "chunk_tokens": self.scorer.chunk_tokens,
            "prepend_bos": bool(self.scorer.bos),
        }

    def choose(self, prepared: Prepared, question: str | None) -> Choice:
        """See UnitCompressor. One forward pass over the text."""
        scores = self.scorer.score(prepared.tokens, attention=False).surprisal
        return Choice(keep_forced_and_best(prepared, pool(prepared.units, scores)), scores)

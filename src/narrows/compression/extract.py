"""The extractive rival: whole sentences, picked for the question."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.compression.base import Choice, Prepared, UnitCompressor
from narrows.compression.baselines import keep_forced_and_best
from narrows.compression.units import Granularity
from narrows.errors import InputError
from narrows.retrieve.rank import RANKERS

if TYPE_CHECKING:
    from narrows.model.flat import FlatModel


class Extractive(UnitCompressor):
    """Keeps, in order, the sentences that score highest against the question.

    Args:
        model: only its tokenizer is used.
        ranker: ``"bm25"`` or ``"minilm"``, see ``narrows.retrieve.rank``.
        granularity: what is scored and kept whole.
        options: see ``UnitCompressor``.
    """

    method = "extractive"

    def __init__(
        self,
        model: FlatModel | None = None,
        *,
        ranker: str = "bm25",
        granularity: Granularity = "sentence",
        **options: Any,
    ) -> None:
        super().__init__(model, granularity=granularity, **options)
        self.ranker_name = ranker
        self.ranker = RANKERS.get(ranker)()

    def settings(self) -> dict[str, Any]:
        """See UnitCompressor."""
        return {**super().settings(), "ranker": self.ranker_name}

    def choose(self, prepared: Prepared, question: str | None) -> Choice:
        """See UnitCompressor. Raises InputError without a question."""
        if question is None or not question.strip():
            raise InputError(
                f"method {self.method!r} needs a question: give one, or another method"
            )
        spans, bounds = prepared.tokens.spans, prepared.units.bounds.tolist()
        texts = [prepared.tokens.text[spans[a][0] : spans[b - 1][1]] for a, b in pairwise(bounds)]
        scores = self.ranker.score(question, texts)
        return Choice(
            keep_forced_and_best(prepared, scores), np.repeat(scores, prepared.units.costs)
        )

"""Scores of a target that are known."""

from __future__ import annotations

from torch import Tensor

from narrows.ops.native import row_maxima


class Given:
    """Logits float32 ``[n, vocab_size]``; ``asked`` counts how often they were wanted."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self.asked = 0

    def logits(self) -> Tensor:
        self.asked += 1
        return self._logits

    def best(self) -> tuple[Tensor, Tensor]:
        return row_maxima(self._logits)

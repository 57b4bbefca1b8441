"""A codebook or codes, layer by layer: what stays of a prompt is held as whichever takes less at
equal error.

The error of either is measured alike, on what attention would read of the tokens that stay: the
sum of squared differences from the exact keys over the sum of their squares, and the same of the
values. That of codes is what their bits make it; the thresholds of a codebook are moved until it
errs no more. Of two of the same error, the smaller stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from narrows.cache.plan import layer_bytes
from narrows.cache.quantized import QuantLayer
from narrows.cache.scores import Scorer
from narrows.cache.spindle import SpindleLayer
from narrows.contracts import LayerCache
from narrows.ops.packed import PackedLayer
from narrows.ops.ragged import Place

SURE, MOST = 0.5, 4.0
"""Thresholds are 1 minus a multiple of the codes' error. At half of it no vector can err more than
codes do on average, since vectors of cosine c and the same length differ by 2 (1 - c) of their
square; at four times of it entries are so few that their bytes are the dense tokens'."""

TRIES = 4
"""Codebooks built, at most, before codes are taken for the smaller."""


class EitherLayer(LayerCache):
    """One layer that is ``codes``, or the ``book`` that reads the same prompt, from ``seal`` on.

    ``codes`` drops, as it is sealed, the tokens that ``book`` would drop (``ThinnedLayer``), and
    neither lends its codes nor borrows any.
    """

    def __init__(self, codes: QuantLayer, book: SpindleLayer) -> None:
        self.now: LayerCache = codes
        self.book: SpindleLayer | None = book
        """Until one has been chosen."""

    def seal(self) -> None:
        """See LayerCache. Raises NumericalError if what is kept is not finite."""
        codes, book, self.book = self.now, self.book, None
        if book is None or book.prompt is None:
            return
        assert isinstance(codes, QuantLayer)
        tokens = torch.stack(book.choice(book.options.keep).tokens)[..., None]
        sides = book.prompt.k, book.prompt.v
        exact = [x.take_along_dim(tokens, 1).transpose(0, 1) for x in sides]
        codes.seal()
        # Without what a rollback may ask for, since drafting must not change what is chosen.
        bare = codes.options.model_copy(update={"hold": 0})
        nbytes = layer_bytes(bare, codes.plan, codes.shape, exact[0].dtype, len(exact[0]))
        if _is_smaller(book, exact, _errors(codes.materialize(), exact), nbytes):
            book.seal()
            self.now = book

    @property
    def length(self) -> int:  # type: ignore[override]
        """See LayerCache."""
        return self.now.length

    @property
    def scorer(self) -> Scorer | None:
        """What looks on while the prompt is read."""
        return None if self.book is None else self.book.scorer

    def append(self, k: Tensor, v: Tensor) -> None:
        """See LayerCache."""
        self.now.append(k, v)

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """See LayerCache."""
        return self.now.attend(q, scale)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See LayerCache."""
        return self.now.advance(q, k, v, scale)

    def ready(self, n: int) -> bool:
        """See LayerCache."""
        return self.now.ready(n)

    def places(self, first_row: int, rows: int) -> Sequence[Place | PackedLayer]:
        """See LayerCache."""
        return self.now.places(first_row, rows)

    def settle(self) -> None:
        """See LayerCache."""
        self.now.settle()

    def rollback(self, n: int) -> None:
        """See LayerCache."""
        self.now.rollback(n)

    def materialize(self) -> tuple[Tensor, Tensor]:
        """See LayerCache."""
        return self.now.materialize()

    @property
    def nbytes(self) -> int:
        """See LayerCache."""
        return self.now.nbytes


def _is_smaller(
    book: SpindleLayer, exact: Sequence[Tensor], errors: Sequence[float], nbytes: int
) -> bool:
    """Whether thresholds were found, and left in the options of ``book``, at which it holds the
    ``exact`` keys and values in less than ``nbytes`` and with no greater ``errors``."""
    low, high, multiple = SURE, MOST, 1.0
    for _ in range(TRIES):
        theta_k, theta_v = (max(-0.99, 1 - multiple * error) for error in errors)
        book.options = book.options.model_copy(update={"theta_k": theta_k, "theta_v": theta_v})
        book.thin(book.options.keep)
        if not book.coding:
            return False
        heads = range(len(exact[0][0]))
        held = [torch.stack([book.kept.whole(s, h) for h in heads], 1) for s in (0, 1)]
        smaller = book.kept.nbytes < nbytes
        close = all(e <= w for e, w in zip(_errors(held, exact), errors, strict=True))
        if smaller == close:  # else other thresholds may trade the one for the other
            return smaller
        low, high = (multiple, high) if close else (low, multiple)
        multiple = math.sqrt(low * high)
    return False


def _errors(held: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Squared differences over squares, of keys and of values ``[n, kv_heads, dim]``."""
    return [
        float((a.float() - b.float()).square().sum() / b.float().square().sum().clamp_min(1e-30))
        for a, b in zip(held, exact, strict=True)
    ]

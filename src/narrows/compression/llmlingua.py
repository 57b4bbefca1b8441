"""The iterative rival: whole passages first, then tokens, each judged after what was kept.

After Jiang et al., "LLMLingua: Compressing Prompts for Accelerated Inference of Large Language
Models" (2023), with two departures: the budget is met exactly, by a share for every segment in
place of a threshold on perplexity, and the passages of the coarse step are found in the text,
not marked by the caller.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from narrows.cache.dense import DensePolicy
from narrows.compression.base import Choice, Prepared, UnitCompressor
from narrows.compression.baselines import keep_forced_and_best
from narrows.compression.score import Scorer, token_surprisal
from narrows.compression.select import Shares
from narrows.compression.units import pool, runs, tokens_of
from narrows.contracts import Document, LayerCache
from narrows.errors import ConfigError
from narrows.retrieve.passages import split_passages

if TYPE_CHECKING:
    from narrows.model.flat import FlatModel

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


class LLMLingua(UnitCompressor):
    """Coarse to fine: passages of high perplexity survive, then their surprising tokens.

    Args:
        model: the scoring model.
        coarse_factor: the passages kept hold at least this many times the free budget.
        passage_tokens: about how large the passages of the coarse step are, in tokens.
        segment_tokens: tokens judged at once in the fine step. Each segment is scored after the
            kept tokens of those before it, so it takes two forward passes: all of it, then what
            is kept.
        options: see ``UnitCompressor``.
    """

    method = "llmlingua"

    def __init__(
        self,
        model: FlatModel | None = None,
        *,
        coarse_factor: float = 2.0,
        passage_tokens: int = 200,
        segment_tokens: int = 200,
        **options: Any,
    ) -> None:
        if model is None:
            raise ConfigError(f"method {self.method!r} needs a model")
        super().__init__(model, **options)
        for name, value in (
            ("coarse_factor", coarse_factor),
            ("passage_tokens", passage_tokens),
            ("segment_tokens", segment_tokens),
        ):
            if not value >= 1:
                raise ConfigError(f"{name} must be at least 1 (given: {value})")
        self.model = model
        self.coarse_factor = coarse_factor
        self.passage_tokens = passage_tokens
        self.segment_tokens = segment_tokens
        # A passage is judged by itself, so the only limit is what the model reads at once.
        self._scorer = Scorer(model, chunk_tokens=model.shape.max_tokens, left_context=0)

    def settings(self) -> dict[str, Any]:
        """See UnitCompressor."""
        return {
            **super().settings(),
            "model": self.model.name,
            "coarse_factor": self.coarse_factor,
            "passage_tokens": self.passage_tokens,
            "segment_tokens": self.segment_tokens,
        }

    def choose(self, prepared: Prepared, question: str | None) -> Choice:
        """See UnitCompressor. Scores are those a token was last judged by."""
        scores = np.zeros(len(prepared.tokens.ids))
        alive, passages = self._coarse(prepared, scores)
        kept, segments = self._fine(prepared, alive, scores)
        # Shares rounded to whole units can leave a little over; it goes to the best of the rest.
        unit_scores = np.where(kept, np.inf, pool(prepared.units, scores))
        report = {"passages": passages, "segments": segments}
        return Choice(keep_forced_and_best(prepared, unit_scores), scores, report)

    def _coarse(self, prepared: Prepared, scores: Floats) -> tuple[Mask, dict[str, int]]:
        """Units of passages that survive, with all forced ones; fills ``scores`` in passing."""
        costs = np.where(prepared.forced, 0, prepared.units.costs)
        wanted = self.coarse_factor * prepared.free
        if costs.sum() <= wanted:
            return np.ones(len(costs), dtype=bool), {"found": 1, "kept": 1}
        edges = _passage_edges(prepared, self.passage_tokens)
        bounds = prepared.units.bounds[edges]
        perplexity = []
        for a, b in pairwise(bounds.tolist()):
            nats = self._scorer.score(prepared.tokens.ids[a:b], attention=False).surprisal
            scores[a:b] = nats
            perplexity.append(nats.sum() / max(b - a - 1, 1))  # its logarithm: same order
        order = np.argsort(-np.array(perplexity), kind="stable")
        held = np.cumsum(np.add.reduceat(costs, edges[:-1])[order])
        surviving = order[: np.searchsorted(held, wanted) + 1]
        alive = prepared.forced.copy()
        for passage in surviving:
            alive[edges[passage] : edges[passage + 1]] = True
        return alive, {"found": len(order), "kept": len(surviving)}

    def _fine(self, prepared: Prepared, alive: Mask, scores: Floats) -> tuple[Mask, int]:
        """Units kept, segment by segment; writes ``scores`` of living tokens."""
        units, ids = prepared.units, np.array(prepared.tokens.ids)
        kept = prepared.forced.copy()
        prefix = _Prefix(self.model)
        shares = Shares(units.costs, alive & ~prepared.forced, prepared.free)
        segments = 0
        for segment in runs(np.flatnonzero(alive), units.costs, self.segment_tokens):
            places = tokens_of(units, segment)
            scores[places] = nats = prefix.surprisal(ids[places].tolist())
            kept[shares.pick(segment, nats)] = True
            prefix.extend(ids[tokens_of(units, segment[kept[segment]])].tolist())
            segments += 1
        return kept, segments


class _Prefix:
    """The compressed text so far, in the model's caches."""

    def __init__(self, model: FlatModel) -> None:
        self.model = model
        self.ids: list[int] = []
        self._sliding = any(layer.window for layer in model.shape.layers)
        self._restart([])

    def _restart(self, ids: list[int]) -> None:
        self._caches = DensePolicy().build(self.model.shape)
        self._length = 0
        self._last: Tensor | None = None  # the newest token's hidden state
        self._extend(ids)

    def extend(self, ids: list[int]) -> None:
        """Append tokens for good."""
        self.ids += ids
        self._extend(ids)

    def _extend(self, ids: list[int]) -> None:
        if ids:
            self._last = self._read(ids, self._caches)[-1:]
            self._length += len(ids)

    @torch.inference_mode()
    def surprisal(self, ids: list[int]) -> Floats:
        """-ln p of each token after the prefix and those before it, in nats; the caches stay as
        they were. A first token, which nothing predicts, counts as the most surprising."""
        room = self.model.shape.max_tokens - len(ids)
        if room < 0:
            raise ConfigError(
                f"{len(ids)} tokens at once are more than {self.model.name} can read: lower "
                "segment_tokens or choose a finer granularity"
            )
        if self._length > room:  # go on after the newest half of what fits
            self._restart(self.ids[len(self.ids) - room // 2 :])
        # A sliding layer frees what a long rollback would bring back, so it works on a copy.
        caches = copy.deepcopy(self._caches) if self._sliding else self._caches
        states = self._read(ids, caches)
        if not self._sliding:
            for layer in caches:
                layer.rollback(len(ids))
        known = [] if self._last is None else [self._last]
        predicting = torch.cat([*known, states[:-1]])
        targets = torch.tensor(ids[len(ids) - len(predicting) :], device=states.device)
        found = token_surprisal(self.model, predicting, targets)
        return found if known else np.append(found.max(initial=0.0), found)

    def _read(self, ids: list[int], caches: list[LayerCache]) -> Tensor:
        return self.model.read(ids, caches, self._length)


def _passage_edges(prepared: Prepared, size: int) -> NDArray[np.int64]:
    """First unit of every passage of about ``size`` tokens, and the number of units."""
    tokens, units = prepared.tokens, prepared.units
    characters = max(1, size * len(tokens.text) // len(tokens.ids))
    passages = split_passages(Document("", tokens.text), characters)
    starts = [tokens.spans[token][0] for token in units.bounds[:-1]]
    owner = np.searchsorted([p.span[0] for p in passages], starts, side="right")
    return np.append(np.flatnonzero(np.diff(owner, prepend=-1)), len(units))

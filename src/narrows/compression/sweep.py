"""DAC in one sweep: our extension, not the paper's.

DAC reads what is left again in every stage, because deletion changes the surprisal of what
follows. Here the text is read once, segment after segment, each segment *after the compressed
text before it*: what a segment does not keep is taken out of the caches before the next one is
read. So every token is judged in the light of all deletions before it, at the price of a single
pass; what it cannot know is what will be deleted behind it. Signals and their fusion are DAC's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from narrows.compression.attn_norm import AttnNorm, normalise
from narrows.compression.base import Choice, Prepared, UnitCompressor
from narrows.compression.dac import COMMON, DacOptions, fuse
from narrows.compression.score import check_finite, token_surprisal
from narrows.compression.select import Shares
from narrows.compression.stages import keep_best
from narrows.compression.units import pool, runs, tokens_of
from narrows.contracts import LayerCache
from narrows.errors import ConfigError
from narrows.ops.attention import causal_attention
from narrows.ops.blocked import blocked_attention
from narrows.ops.native import attention_dtype

if TYPE_CHECKING:
    from narrows.model.flat import FlatModel

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

BLOCK_ROWS = 64
"""Query rows of attention weights held at once."""


class SweepOptions(DacOptions):
    """``segment_tokens`` are read, judged and cut at once; of DacOptions only ``fusion``,
    ``alpha``, ``attn_norm``, ``clip_quantile`` and ``pool`` have a part in a sweep."""

    segment_tokens: Annotated[int, Field(ge=1)] = 512
    attn_norm: AttnNorm = "vs_uniform"


class DacSweep(UnitCompressor):
    """Surprisal and received attention, fused, in one pass that forgets as it reads.

    Every segment keeps the same share of its free tokens. Args: as DAC's, with SweepOptions.
    Raises ConfigError without a model, or for a bad option.
    """

    method = "dac-sweep"

    def __init__(self, model: FlatModel | None = None, **options: Any) -> None:
        if model is None:
            raise ConfigError(f"method {self.method!r} needs a model to score with")
        common = {k: options.pop(k) for k in COMMON if k in options}
        super().__init__(model, **common)
        self.options = SweepOptions(**options)
        self.model = model
        if self.options.segment_tokens > model.shape.max_tokens:
            raise ConfigError(
                f"segment_tokens {self.options.segment_tokens} is more than the "
                f"{model.shape.max_tokens} tokens that {model.name} can read at once"
            )

    def settings(self) -> dict[str, Any]:
        """See UnitCompressor."""
        used = {"fusion", "alpha", "attn_norm", "clip_quantile", "pool", "segment_tokens"}
        options = self.options.model_dump(include=used)
        return {**super().settings(), **options, "model": self.model.name}

    def choose(self, prepared: Prepared, question: str | None) -> Choice:
        """See UnitCompressor. ``question`` has no part in it; a score is comparable within its
        segment only."""
        units, ids = prepared.units, prepared.tokens.ids
        forced = prepared.forced.copy()
        forced[0] |= units.costs[0] <= prepared.free
        free_budget = prepared.budget - int(units.costs[forced].sum())
        kept, scores = forced.copy(), np.zeros(len(ids))
        sweep = _Sweep(self.model, attention=self.options.needs_attention)
        shares = Shares(units.costs, ~forced, free_budget)
        segments = 0
        for segment in runs(np.arange(len(units)), units.costs, self.options.segment_tokens):
            places = tokens_of(units, segment)
            surprisal, attention = sweep.read([ids[t] for t in places], self.options.attn_norm)
            # DAC leaves the first token out of its scaling; here every one is predicted.
            heed = None if attention is None else np.append(0.0, attention)
            scores[places] = nats = fuse(np.append(0.0, surprisal), heed, self.options)[1:]
            kept[shares.pick(segment, nats, self.options.pool)] = True
            sweep.forget(np.repeat(~kept[segment], units.costs[segment]))
            segments += 1
        # Shares rounded to whole units can leave a little over; it goes to the best of the rest.
        rest = free_budget - shares.spent
        if rest:
            kept |= keep_best(pool(units, scores), units.costs, ~kept, rest)
        return Choice(kept, scores, {"segments": segments})


class SweepLayer(LayerCache):
    """One layer of what a sweep remembers. ``mass`` float32 ``[length]`` is the attention that
    every token received from the newest append on (None: not asked for); ``stored`` as
    OnePassLayer's."""

    def __init__(self, window: int | None, attention: bool, stored: torch.dtype) -> None:
        self.window = window
        self.attention = attention
        self.stored = stored
        self.length = 0
        self.mass: Tensor | None = None
        self._kv: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """See LayerCache."""
        if self._kv is not None:
            k, v = torch.cat([self._kv[0], k]), torch.cat([self._kv[1], v])
        self._kv = k, v
        self.length = k.shape[0]

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """See LayerCache."""
        k, v = self.materialize()
        if not self.attention:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            return causal_attention(q, k, v, scale, self.window, attention_dtype(q, self.stored))
        self.mass = torch.zeros(self.length, device=q.device)
        dtype = attention_dtype(q, self.stored)
        return blocked_attention(q, k, v, scale, self.mass, self.window, BLOCK_ROWS, dtype)

    def keep(self, newest: Tensor) -> None:
        """Of the newest tokens keep those where ``newest`` (bool) holds."""
        k, v = self.materialize()
        old = k.shape[0] - newest.shape[0]
        self._kv = (
            torch.cat([k[:old], k[old:][newest]]),
            torch.cat([v[:old], v[old:][newest]]),
        )
        self.length = self._kv[0].shape[0]

    def rollback(self, n: int) -> None:
        """See LayerCache."""
        k, v = self.materialize()
        self._kv = k[: self.length - n], v[: self.length - n]
        self.length -= n

    def materialize(self) -> tuple[Tensor, Tensor]:
        """See LayerCache."""
        if self._kv is None:
            raise ValueError("a sweep that has read nothing holds nothing")
        return self._kv

    @property
    def nbytes(self) -> int:
        """See LayerCache."""
        return sum(x.nbytes for x in self._kv or ())


class _Sweep:
    """A text being read once: the caches of what was kept of it so far."""

    def __init__(self, model: FlatModel, attention: bool) -> None:
        self.model = model
        self.attention = attention
        self._restart()

    def _restart(self) -> None:
        shape = self.model.shape
        self._layers = [SweepLayer(x.window, self.attention, shape.dtype) for x in shape.layers]
        self._position = 0
        self._last: Tensor | None = None  # the newest token's hidden state

    @torch.inference_mode()
    def read(self, ids: list[int], norm: AttnNorm) -> tuple[Floats, Floats | None]:
        """Surprisal (nats) and received attention (see ``normalise``), float64 ``[n]`` each, of
        the next ``n`` tokens of the text. The very first token, which nothing predicts, has 0.

        Deleted tokens leave gaps in the positions, so that the kept ones stand as far apart as in
        the text; when the positions run out the sweep starts anew without its past.
        """
        if self._position + len(ids) > self.model.shape.max_tokens:
            self._restart()
        device = self.model.shape.device
        past = self._layers[0].length
        read = torch.tensor(ids, device=device)
        states = self.model.read(ids, list(self._layers), self._position)
        self._position += len(ids)
        known = [] if self._last is None else [self._last]
        self._last = states[-1:]
        predicting = torch.cat([*known, states[:-1]])
        surprisal = np.zeros(len(ids))
        targets = read[len(ids) - len(predicting) :]
        surprisal[len(ids) - len(predicting) :] = token_surprisal(self.model, predicting, targets)
        check_finite(surprisal, "logits")
        return surprisal, self._received(past, norm) if self.attention else None

    def forget(self, gone: Mask) -> None:
        """Take tokens of the newest segment (bool ``[n]``) out of every layer."""
        stay = torch.from_numpy(~gone).to(self.model.shape.device)
        for layer in self._layers:
            layer.keep(stay)

    def _received(self, past: int, norm: AttnNorm) -> Floats:
        shape = self.model.shape
        total = torch.stack([x.mass for x in self._layers if x.mass is not None]).double().sum(0)
        mean = total.cpu().numpy() / (len(shape.layers) * shape.heads)
        check_finite(mean, "attention weights")
        return normalise(mean, past, norm, tuple(x.window for x in shape.layers))

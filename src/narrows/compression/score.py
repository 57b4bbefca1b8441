"""Two numbers for every token of a text: how surprising it is, and how much attention it received.

One causal language model reads the text in chunks laid end to end in flat passes. A chunk is
fed a few tokens of what precedes it, which give it context and are not scored with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from narrows.compression.attn_norm import AttnNorm, check_attn_norm, normalise
from narrows.compression.chunks import Breaks, Chunk, chunk_breaks, pack, split
from narrows.compression.units import TokenizedText, make_units
from narrows.contracts import FlatBatch, LayerCache, Span
from narrows.errors import ConfigError, NumericalError
from narrows.model.flat import FlatModel
from narrows.ops.attention import causal_attention
from narrows.ops.blocked import blocked_attention
from narrows.ops.native import attention_dtype, flow_dtype

Floats = NDArray[np.float64]

PASS_TOKENS = 2048
"""Tokens of several chunks read in one flat pass; a longer chunk goes alone."""
LOGIT_ROWS = 256
"""Rows of logits held at once."""
LOSS_ROWS = 16
"""Rows of logits reduced at once: few enough to stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of the ``n`` tokens of one text.

    ``surprisal`` is -ln p(token | what precedes it), in nats. ``attention`` is the attention
    received, mean over layers and heads, after ``attn_norm`` (None if not asked for). A text's
    first token has no score (both are 0) unless a BOS stands before it; the first token of a
    later chunk fed without context takes the mean of its chunk. ``chunks`` are token ranges.
    """

    surprisal: Floats
    attention: Floats | None
    chunks: list[Span]


class OnePassLayer(LayerCache):
    """One layer of one chunk, read in one go: holds keys and values only until they are used.

    ``mass`` float32 ``[n]`` collects the attention every token receives; None turns that off.
    ``stored`` is the precision a cache of this model would have, see ``attention_dtype``.
    """

    def __init__(
        self,
        window: int | None,
        mass: Tensor | None,
        block_rows: int,
        stored: torch.dtype = torch.float32,
    ) -> None:
        self.window = window
        self.mass = mass
        self.block_rows = block_rows
        self.stored = stored
        self.length = 0
        self._kv: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """See LayerCache. Allowed once; keeps references, not copies."""
        if self.length:
            raise ValueError("a one-pass layer takes its tokens in one append")
        self.length = k.shape[0]
        self._kv = k, v

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """See LayerCache. Forgets the keys and values."""
        k, v = self.materialize()
        self._kv = None
        dtype = attention_dtype(q, self.stored)
        if self.mass is None:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            return causal_attention(q, k, v, scale, self.window, dtype)
        return blocked_attention(q, k, v, scale, self.mass, self.window, self.block_rows, dtype)

    def rollback(self, n: int) -> None:
        """See LayerCache. Raises ValueError: nothing is kept that could be rolled back."""
        raise ValueError("a one-pass layer keeps no history")

    def materialize(self) -> tuple[Tensor, Tensor]:
        """See LayerCache. Raises ValueError once the tokens have been attended to."""
        if self._kv is None:
            raise ValueError("a one-pass layer holds nothing after it has attended")
        return self._kv

    @property
    def nbytes(self) -> int:
        """See LayerCache: the tensors are the forward pass's own."""
        return 0


class Scorer:
    """Scores texts with one model.

    Args:
        model: the scoring model.
        chunk_tokens: longest chunk (shorter for a model that reads less at once); 0 reads every
            text whole. A text no longer than this is read exactly as with 0.
        left_context: tokens before a chunk that are fed with it.
        prepend_bos: put the model's BOS before every chunk, so that a text's first token is
            scored too and a token nobody needs collects the attention that first places draw.
        attn_norm: see ``narrows.compression.attn_norm``; "sum" is the DAC paper's.
        block_rows: query rows of attention weights held at once.

    Raises:
        ConfigError: for a bad option.
    """

    def __init__(
        self,
        model: FlatModel,
        *,
        chunk_tokens: int = 1024,
        left_context: int = 64,
        prepend_bos: bool = False,
        attn_norm: AttnNorm = "sum",
        block_rows: int = 64,
    ) -> None:
        for name, value, least in (
            ("chunk_tokens", chunk_tokens, 0),
            ("left_context", left_context, 0),
            ("block_rows", block_rows, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least} (given: {value})")
        check_attn_norm(attn_norm)
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.left_context = left_context
        self.attn_norm = attn_norm
        self.block_rows = block_rows
        self.bos = _bos(model) if prepend_bos else []
        self.room = model.shape.max_tokens - len(self.bos) - left_context
        if self.room < 1:
            raise ConfigError(
                f"left_context {left_context} leaves no room in the {model.shape.max_tokens} "
                f"tokens that {model.name} can read at once"
            )

    def score(
        self,
        tokens: TokenizedText | Sequence[int],
        breaks: Breaks | None = None,
        *,
        attention: bool = True,
    ) -> TokenScores:
        """Score one text, given as such or as token ids, with one forward pass over it.

        ``breaks`` int8 ``[n]`` says where a chunk may end (see ``chunk_breaks``); None finds out
        from a TokenizedText and takes all places in bare ids alike. Without ``attention`` the
        cheaper plain attention runs.

        Raises ConfigError for a text longer than the model can read with ``chunk_tokens`` 0,
        NumericalError if the model's numbers are not finite.
        """
        if isinstance(tokens, TokenizedText):
            if breaks is None:
                breaks = chunk_breaks(tokens, make_units(tokens))
            tokens = tokens.ids
        ids = list(tokens)
        spans = split(len(ids), breaks, self._limit(len(ids)))
        surprisal = np.zeros(len(ids))
        received = np.zeros(len(ids)) if attention else None
        for group in pack([self._chunk(ids, span) for span in spans], PASS_TOKENS):
            masses = self._read(group, surprisal, attention)
            for chunk, mass in zip(group, masses, strict=True):
                if received is not None:
                    received[chunk.scored] = self._normalise(mass, chunk)
        check_finite(surprisal, "logits")
        if received is not None:
            check_finite(received, "attention weights")
        if not self.bos and not self.left_context:
            for a, b in spans[1:]:
                for values in (surprisal, received):
                    if values is not None and b - a > 1:
                        values[a] = values[a + 1 : b].mean()
        return TokenScores(surprisal, received, spans)

    def _limit(self, n: int) -> int:
        """The longest chunk of a text of ``n`` tokens, 0 if it can be read whole."""
        whole = n + len(self.bos) <= self.model.shape.max_tokens
        if whole and (n <= self.chunk_tokens or not self.chunk_tokens):
            return 0
        if not self.chunk_tokens:
            raise ConfigError(
                f"the text has {n} tokens, {self.model.name} can read "
                f"{self.model.shape.max_tokens} at once; set chunk_tokens to at most {self.room}"
            )
        return min(self.chunk_tokens, self.room)

    def _chunk(self, ids: list[int], span: Span) -> Chunk:
        start, stop = span
        context = ids[max(0, start - self.left_context) : start]
        lead = len(self.bos) + len(context)
        return Chunk([*self.bos, *context, *ids[start:stop]], lead, start)

    @torch.inference_mode()
    def _read(self, group: list[Chunk], surprisal: Floats, attention: bool) -> list[Tensor | None]:
        """One flat pass: write the scored tokens' surprisal, return each chunk's column sums."""
        shape = self.model.shape
        ends = np.cumsum([len(c.ids) for c in group]).tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        masses = [torch.zeros(b - a, device=shape.device) if attention else None for a, b in spans]
        caches: list[list[LayerCache]] = [
            [OnePassLayer(x.window, mass, self.block_rows, shape.dtype) for x in shape.layers]
            for mass in masses
        ]
        ids = torch.tensor([i for c in group for i in c.ids], device=shape.device)
        positions = torch.cat([torch.arange(b - a) for a, b in spans]).to(shape.device)
        states = self.model.hidden(ids, positions, FlatBatch(spans, caches))
        for chunk, (a, b) in zip(group, spans, strict=True):
            rows = slice(a + chunk.first, b)
            predicting = states[rows.start - 1 : b - 1]
            surprisal[chunk.scored] = token_surprisal(self.model, predicting, ids[rows])
        return masses

    def _normalise(self, mass: Tensor | None, chunk: Chunk) -> Floats:
        assert mass is not None
        shape = self.model.shape
        mean = mass.double().cpu().numpy() / (len(shape.layers) * shape.heads)
        windows = tuple(layer.window for layer in shape.layers)
        return normalise(mean, chunk.first, self.attn_norm, windows)


def _bos(model: FlatModel) -> list[int]:
    for source in (model.tokenizer, model.config):
        bos = getattr(source, "bos_token_id", None)
        if bos is not None:
            return [int(bos)]
    raise ConfigError(f"prepend_bos: {model.name} has no BOS token")


def token_surprisal(model: FlatModel, states: Tensor, targets: Tensor) -> Floats:
    """-ln p of ``targets`` int64 ``[n]``, each predicted by its row of ``states`` ``[n, hidden]``:
    nats, float64 ``[n]``. Never holds more than LOGIT_ROWS rows of logits."""
    nats = torch.empty(len(targets), device=targets.device)
    for a in range(0, len(targets), LOGIT_ROWS):
        rows = states[a : a + LOGIT_ROWS]
        if rows.dtype is torch.float32:
            # Rounded here as the product would, they give logits that are not widened yet.
            rows = rows.to(flow_dtype(len(rows), model.head))
        logits = model.logits(rows)
        for i in range(0, len(logits), LOSS_ROWS):
            few = slice(a + i, min(a + i + LOSS_ROWS, len(targets)))
            wide = logits[i : i + LOSS_ROWS].float()
            nats[few] = cross_entropy(wide, targets[few], reduction="none")
    return np.asarray(nats.double().cpu().numpy())


def check_finite(values: Floats, what: str) -> None:
    """Raises NumericalError unless all of ``values`` of ``what`` are finite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise NumericalError(
            f"the scoring model gave {what} that are not finite, first at token {bad[0]} of "
            f"{len(values)}; try dtype float32"
        )

"""What makes a token worth keeping: scorers of eviction, one object a layer and sequence.

A scorer stands between a layer's dense prompt and its attention: it lets the layer attend as it
would without it, notes what it needs, and rates all tokens when the prompt has been read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from narrows.cache.dense import DenseLayer
from narrows.contracts import Rotary, Span
from narrows.ops import flash
from narrows.ops.attention import visible
from narrows.ops.blocked import blocked_attention
from narrows.ops.native import attention_dtype, softmax_mass_
from narrows.ops.rotary import turn, turn_back

BLOCK = 128
"""Query rows whose attention is held at once."""
FUTURE = 512
"""Places behind the prompt over which expected attention is a mean."""


class Scorer(ABC):
    """Rates the tokens of one layer's prompt."""

    rehearsal: Span | None = None
    """The prompt's tokens that the queries being read now repeat, if they do."""

    def attend(self, q: Tensor, dense: DenseLayer, scale: float) -> Tensor:
        """``dense.attend`` of queries ``[n, heads, dim]`` of its newest ``n`` tokens, noting what
        the rating needs."""
        self.see(q, dense, scale)
        return dense.attend(q, scale)

    def see(self, q: Tensor, dense: DenseLayer, scale: float) -> None:  # noqa: B027
        """Note the queries; for scorers that need no more than that."""

    @abstractmethod
    def rate(self, dense: DenseLayer) -> Tensor:
        """Float32 ``[query heads or kv_heads, tokens]``: the greater, the more worth keeping."""


class WindowAttention(Scorer):
    """Mean attention that the newest ``window`` queries pay (SnapKV; SpindleKV's equation 2).

    ``norm`` "eq2" divides by the number of tokens from each token on, as the paper prints it.
    ``pool`` smooths over ``kernel`` neighbouring tokens of the context.
    """

    def __init__(
        self,
        window: int,
        norm: Literal["window", "eq2"],
        pool: Literal["none", "avg", "max"],
        kernel: int,
    ) -> None:
        self.window, self.norm, self.pool, self.kernel = window, norm, pool, kernel
        self.q: Tensor | None = None
        self.scale = 1.0

    def see(self, q: Tensor, dense: DenseLayer, scale: float) -> None:
        """See Scorer: keeps the newest queries."""
        newest = q[-self.window :]
        known = newest if self.q is None else torch.cat([self.q, newest])
        self.q, self.scale = known[-self.window :].clone(), scale

    def rate(self, dense: DenseLayer) -> Tensor:
        """See Scorer: a row a query head."""
        assert self.q is not None
        tokens, rows = dense.held, len(self.q)
        paid = attention(self.q, dense.k[:, :tokens], self.scale).mean(1)
        context = tokens - rows
        if self.norm == "eq2":
            paid[:, :context] *= rows
            paid[:, :context] /= torch.arange(tokens, tokens - context, -1, device=paid.device)
        if self.pool != "none" and context:
            pooled = functional.avg_pool1d if self.pool == "avg" else functional.max_pool1d
            smooth = pooled(paid[:, :context], self.kernel, stride=1, padding=self.kernel // 2)
            paid[:, :context] = smooth
        return paid


class AccumulatedAttention(Scorer):
    """All attention that a token has received (H2O); ``norm`` "eq2" divides by the number of
    queries that see it."""

    def __init__(self, norm: Literal["window", "eq2"]) -> None:
        self.norm = norm
        self.mass: Tensor | None = None

    def attend(self, q: Tensor, dense: DenseLayer, scale: float) -> Tensor:
        """See Scorer: adds up the columns on the way, a row a query head."""
        tokens, heads = dense.held, q.shape[1]
        mass = q.new_zeros((heads, tokens), dtype=torch.float32)
        if self.mass is not None:
            mass[:, : self.mass.shape[1]] = self.mass
        self.mass = mass
        k, v = (x[:, :tokens].transpose(0, 1) for x in (dense.k, dense.v))
        dtype = attention_dtype(q, dense.k.dtype)
        return blocked_attention(q, k, v, scale, mass, block_rows=BLOCK, dtype=dtype)

    def rate(self, dense: DenseLayer) -> Tensor:
        """See Scorer: a row a query head."""
        assert self.mass is not None
        if self.norm == "eq2":
            return self.mass / torch.arange(dense.held, 0, -1, device=self.mass.device)
        return self.mass


class ExpectedAttention(Scorer):
    """The attention a token will get from queries to come, taken as normal with the mean and
    covariance of the prompt's, turned to the places behind it; times the norm of its value
    (Expected Attention, arXiv 2510.00636). Knows nothing of the question."""

    def __init__(self, rotary: Rotary, sinks: int) -> None:
        self.rotary, self.sinks = rotary, sinks
        self.count = 0
        self.sum: Tensor | None = None
        self.products: Tensor | None = None
        self.scale = 1.0

    def see(self, q: Tensor, dense: DenseLayer, scale: float) -> None:
        """See Scorer: sums up the queries as they were before they were turned. The first tokens
        of a prompt are unlike all others and do not count."""
        places = torch.arange(dense.length - len(q), dense.length, device=q.device)
        plain = turn_back(q.float(), *self.rotary(places))[places >= self.sinks].transpose(0, 1)
        total, products = plain.sum(1), plain.transpose(1, 2) @ plain
        self.sum = total if self.sum is None else self.sum + total
        self.products = products if self.products is None else self.products + products
        self.count += plain.shape[1]
        self.scale = scale

    def rate(self, dense: DenseLayer) -> Tensor:
        """See Scorer: a row a query head."""
        assert self.sum is not None
        assert self.products is not None
        count, tokens = max(1, self.count), dense.held
        mean = self.sum / count
        spread = self.products / count - mean[:, :, None] * mean[:, None]
        places = torch.arange(dense.length, dense.length + FUTURE, device=mean.device)
        cosine, sine = (t.mean(0, keepdim=True) for t in self.rotary(places))
        # The mean of the rotations is one matrix; its rows are what it makes of unit vectors.
        unit = torch.eye(mean.shape[1], device=mean.device)[:, None]
        rotation = turn(unit, cosine.expand(len(unit), -1), sine.expand(len(unit), -1))[:, 0]
        mean, spread = mean @ rotation, rotation.T @ spread @ rotation
        groups = dense.k.shape[0]
        keys = dense.k[:, None, :tokens].float()
        mean, spread = (x.reshape(groups, -1, *x.shape[1:]) for x in (mean, spread))
        score = (keys @ mean[..., None])[..., 0] * self.scale
        score += 0.5 * self.scale**2 * ((keys @ spread) * keys).sum(-1)
        value = dense.v[:, None, :tokens].float().norm(dim=-1)
        rated = torch.zeros_like(score)
        rated[..., self.sinks :] = score[..., self.sinks :].softmax(-1) * value[..., self.sinks :]
        return rated.flatten(0, 1)


class Reconstruction(Scorer):
    """The most attention any query pays a token while the prompt is repeated after itself
    (KVzip, arXiv 2505.23416). See ``cache.rehearse``."""

    def __init__(self) -> None:
        self.most: Tensor | None = None

    def attend(self, q: Tensor, dense: DenseLayer, scale: float) -> Tensor:
        """See Scorer."""
        if self.rehearsal is None:
            return dense.attend(q, scale)
        tokens, dtype = dense.held, attention_dtype(q, dense.k.dtype)
        paid = q.new_zeros((q.shape[1], tokens), dtype=torch.float32)
        a, b = self.rehearsal
        if flash.supported(q, dtype):
            k, v = dense.k[:, :tokens], dense.v[:, :tokens]
            out = flash.flash_attention(q, k, v, scale, None, paid, (a, b), most=True).to(q.dtype)
        else:
            out = dense.attend(q, scale)
            _most(q, dense.k[:, :tokens].to(dtype), scale, paid, (a, b))
        if self.most is None:
            self.most = torch.zeros_like(paid[:, : tokens - len(q)])
        self.most[:, a:b] = torch.maximum(self.most[:, a:b], paid[:, a:b])
        return out

    def rate(self, dense: DenseLayer) -> Tensor:
        """See Scorer: a row a query head; all alike if nothing was rehearsed."""
        if self.most is None:
            return dense.k.new_zeros((dense.k.shape[0], dense.held), dtype=torch.float32)
        return self.most


def _most(q: Tensor, k: Tensor, scale: float, paid: Tensor, span: Span) -> None:
    """Put the most that the newest tokens' queries ``[n, heads, dim]`` pay each of the keys
    ``[kv_heads, tokens, dim]`` of a ``span`` before them in ``paid`` float32 ``[heads, tokens]``,
    which is 0."""
    a, b = span
    n, tokens, groups = len(q), k.shape[1], k.shape[0]
    scaled = (q.float() * scale).to(k.dtype).view(n, groups, -1, q.shape[2])
    for first in range(0, n, BLOCK):
        rows = scaled[first : first + BLOCK]
        seen = tokens - n + first + len(rows)
        # Rows of a KV head's query heads lie next to each other, as the softmax wants them.
        flat = rows.transpose(0, 1).reshape(groups, -1, q.shape[2])
        scores = (flat @ k[:, :seen].transpose(1, 2)).float()
        softmax_mass_(scores, rows.shape[2], seen - len(rows), None)
        most = scores.view(groups, len(rows), -1, seen)[..., a:b].amax(1).flatten(0, 1)
        paid[:, a:b] = torch.maximum(paid[:, a:b], most)


class KeyNorm(Scorer):
    """Keys of small norm first (arXiv 2406.11430)."""

    def rate(self, dense: DenseLayer) -> Tensor:
        """See Scorer: a row a KV head."""
        norm: Tensor = dense.k[:, : dense.held].float().norm(dim=-1)
        return -norm


class KeyDifference(Scorer):
    """Keys least like the mean direction of all keys first (KeyDiff, arXiv 2504.15364)."""

    def rate(self, dense: DenseLayer) -> Tensor:
        """See Scorer: a row a KV head."""
        unit = functional.normalize(dense.k[:, : dense.held].float(), dim=-1)
        likeness: Tensor = functional.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=-1)
        return -likeness


class Recency(Scorer):
    """The newest tokens first."""

    def rate(self, dense: DenseLayer) -> Tensor:
        """See Scorer: a row a KV head."""
        places = torch.arange(dense.held, dtype=torch.float32, device=dense.k.device)
        return places.expand(dense.k.shape[0], -1)


class Chance(Scorer):
    """Any tokens, the same for the same seed and layer: the control."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def rate(self, dense: DenseLayer) -> Tensor:
        """See Scorer: a row a KV head."""
        chance = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand((dense.k.shape[0], dense.held), generator=chance)
        return drawn.to(dense.k.device)


def attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal softmax weights, float32 ``[heads, n, tokens]``, of the newest ``n`` tokens' queries
    ``[n, heads, dim]`` on keys ``[kv_heads, tokens, dim]``."""
    n, tokens, groups = len(q), k.shape[1], k.shape[0]
    rows = (q.float() * scale).transpose(0, 1).reshape(groups, -1, q.shape[2])
    scores = (rows @ k.float().transpose(1, 2)).view(-1, n, tokens)
    hidden = ~visible(tokens - n, n, tokens, None, q.device)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1)

"""How many tokens of a prompt each layer keeps, and which: schedules and choices of eviction.

``keep`` is a share of the prompt, on average over layers; tokens that must stay (the newest
``window``, the first ``sinks``) count as part of it. Sections 4.3, 4.4 and 6 of the sheet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["flat", "pyramid", "pyramidkv"]
Heads = Literal["mean", "max", "union", "per_query_head", "layer"]


def layer_counts(
    schedule: Schedule, keep: float, beta: float, window: int, tokens: int, layers: int
) -> list[int]:
    """Tokens that each of ``layers`` full-attention layers keeps a head of a prompt of ``tokens``.

    ``flat`` keeps the same everywhere. ``pyramid`` falls linearly from the first layer to the
    last, whose context keeps at least the share ``beta`` (SpindleKV's equations 5 and 6 as the
    sheet mends them); both add up to ``keep`` of all tokens exactly, unless the window alone is
    more. ``pyramidkv`` is the rule of PyramidKV's released code, with ``beta`` the ratio of twice
    the mean to the last layer; it keeps what that code keeps, rounding and fallback included.
    """
    if tokens <= window or keep == 1.0:
        return [tokens] * layers
    if schedule == "pyramidkv":
        return [_released(keep, beta, window, tokens, n, layers) for n in range(layers)]
    context = tokens - window
    total = max(0, round(keep * tokens * layers) - window * layers)
    if schedule == "flat":
        return [window + n for n in _spread([1.0] * layers, total, context)]
    share = total / (context * layers)
    if share <= beta:
        first = last = share
    elif share <= (1 + beta) / 2:
        first, last = 2 * share - beta, beta
    else:
        first, last = 1.0, 2 * share - 1
    line = [first + (last - first) * n / max(1, layers - 1) for n in range(layers)]
    if layers == 1:
        line = [share]
    return [window + n for n in _spread(line, total, context)]


def _spread(shares: list[float], total: int, most: int) -> list[int]:
    """Whole numbers in proportion to ``shares`` that add up to ``total``, none over ``most``: each
    rounded down, what is left to the largest fractions, first come first."""
    scale = total / sum(shares) if total else 0.0
    exact = [min(share * scale, float(most)) for share in shares]
    # A hair more than the product, which may fall short of a whole number by rounding.
    counts = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    left = total - sum(counts)
    while left > 0:
        for i in order:
            if left and counts[i] < most:
                counts[i] += 1
                left -= 1
    return counts


def _released(keep: float, beta: float, window: int, tokens: int, layer: int, layers: int) -> int:
    mean = tokens * keep
    least = mean / beta
    most = 2 * mean - least
    if most >= tokens - window:
        most = tokens - window
        least = 2 * mean - most
    if not tokens >= most >= least >= window:
        return max(1, round(tokens * keep))
    step = (most - least) / (layers - 1) if layers > 1 else 0.0
    return round(most - layer * step)


@dataclass(frozen=True, slots=True)
class Choice:
    """What one layer keeps of its prompt.

    ``tokens`` int64, ascending, an entry a KV head; ``seen``, where query heads of a KV head do
    not all see what it holds, is bool ``[group, len(tokens)]`` for each.
    """

    tokens: list[Tensor]
    seen: list[Tensor] | None = None


def choose(
    scores: Tensor,
    count: int,
    *,
    heads: Heads,
    kv_heads: int,
    sinks: int,
    window: int,
    adaptive: bool = False,
    floor: float = 0.2,
) -> Choice:
    """The tokens that each KV head keeps.

    Args:
        scores: float32 ``[query heads or kv_heads, tokens]``; the greater, the more worth keeping.
            Equal scores are won by the earlier token.
        count: tokens a KV head keeps; with ``per_query_head``, that a query head does.
        heads: who decides. ``mean`` and ``max`` over a KV head's query heads; ``layer``: the mean
            over all. ``per_query_head``: each query head for itself, and the KV head holds what
            any of them wants, each seeing its own (SpindleKV's rule). ``union`` (ours): likewise,
            but ``count`` tokens in all, those ranked best by any of them, and all see all.
        kv_heads: KV heads.
        sinks, window: the first and the newest tokens, which stay whatever their score, and if
            that is more than ``count``.
        adaptive: ``count * kv_heads`` tokens go to the best scores of all KV heads together
            (Ada-KV), each head having at least ``floor * count``; with ``mean`` or ``max``.
        floor: see ``adaptive``.
    """
    tokens = scores.shape[1]
    count = min(tokens, max(count, sinks + window))
    if count == tokens:
        everything = torch.arange(tokens, device=scores.device)
        return Choice([everything] * kv_heads)
    scores = scores.clone()
    scores[:, :sinks] = torch.inf
    scores[:, tokens - window :] = torch.inf
    grouped = scores.view(kv_heads, -1, tokens)
    if heads == "per_query_head":
        wanted = _best(grouped, count)
        held = wanted.any(1)
        kept = [row.nonzero()[:, 0] for row in held]
        if grouped.shape[1] == 1:  # rated by KV head, so all of its query heads want the same
            return Choice(kept)
        return Choice(kept, [w[:, t] for w, t in zip(wanted, kept, strict=True)])
    if heads == "union":
        # Ranks that are equal for two query heads are broken by the better sum of ranks.
        ranks = _ranks(grouped)
        best = ranks.amin(1) * (ranks.shape[1] * tokens) + ranks.sum(1)
        held = _best(-best, count)
    else:
        shared = grouped.amax(1) if heads == "max" else grouped.mean(1)
        if heads == "layer":
            shared = shared.mean(0, keepdim=True).expand(kv_heads, -1)
        held = _adaptive(shared, count, floor) if adaptive else _best(shared, count)
    return Choice([row.nonzero()[:, 0] for row in held])


def _order(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True)


def _ranks(scores: Tensor) -> Tensor:
    """0 for the greatest along the last dimension, then 1."""
    order = _order(scores)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _best(scores: Tensor, count: int) -> Tensor:
    """Which are among the ``count`` greatest along the last dimension."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return chosen.scatter_(-1, _order(scores)[..., :count], True)


def _adaptive(scores: Tensor, count: int, floor: float) -> Tensor:
    scores = scores.masked_fill(_best(scores, int(floor * count)), torch.inf)
    return _best(scores.flatten(), count * len(scores)).view(scores.shape)

"""A codebook of one KV head's keys or values: few vectors, and which of them stands for each.

SpindleKV's second stage (arXiv 2507.06517, section 5 of the sheet). An entry is the stored vector
of a token, as it is; a token has the number of its entry and the ratio of the two lengths. So a
token that is its own entry is given back to the bit.

Keys are alike before rotation, but ours are stored after it: an entry keeps its token's rotation,
and every other token it stands for is turned by as many places as lie between the two. In exact
arithmetic this is the paper's rule, whatever scale or frequencies the model's rotation has, and it
needs no look into the model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrows.contracts import Rotary
from narrows.ops.cover import greedy_cover, likeness_graph, nearest
from narrows.ops.ragged import Codes, rebuild
from narrows.ops.rotary import turn_back


@dataclass(frozen=True, slots=True)
class Rule:
    """When vectors are alike: a cosine above ``threshold``; graphs have at most ``block``
    vectors, and as many entries, the newest, are looked at for one that is there already;
    ``covered`` as ``greedy_cover``."""

    threshold: float
    block: int
    covered: bool = False


class Codebook:
    """Vectors ``[n, dim]`` of one head, coded.

    Attributes:
        entries: ``[c, dim]``.
        index: the entry of each vector, int16 or int32 ``[n]``.
        ratio: its length over its entry's, ``[n]``, in the entries' dtype.
        turns: of keys, the places from its entry's to its own, int16 or int32 ``[n]``.
        origin: of keys, the places of the entries, int32 ``[c]``.
    """

    def __init__(self, rule: Rule, rotary: Rotary | None) -> None:
        """Empty; ``rotary`` makes it a codebook of keys."""
        self.rule, self.rotary = rule, rotary
        self.entries: Tensor | None = None
        self.index = self.ratio = torch.empty(0)
        self.turns: Tensor | None = None
        self.origin: Tensor | None = None
        self._farthest = 0
        self._codes: Codes | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Codebook:
        made = Codebook(self.rule, self.rotary)
        for name in ("entries", "index", "ratio", "turns", "origin"):
            held = getattr(self, name)
            setattr(made, name, None if held is None else held.clone())
        made._farthest = self._farthest
        return made

    def extend(self, x: Tensor, places: Tensor, weights: Tensor | None = None) -> None:
        """Code vectors ``x`` ``[n, dim]`` of tokens at ``places`` int64 ``[n]``, a block at a
        time: each by that of the newest ``block`` entries that is most like it, if one is; entries
        are made of the rest. A block costs no more however many came before it. ``weights``: see
        ``greedy_cover``."""
        self._codes = None
        for a in range(0, len(x), self.rule.block):
            part = slice(a, a + self.rule.block)
            self._extend(x[part], places[part], None if weights is None else weights[part])

    def _extend(self, x: Tensor, places: Tensor, weights: Tensor | None) -> None:
        plain = self._plain(x, places)
        known = 0 if self.entries is None else len(self.entries)
        index = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        if self.entries is not None and known:
            first = max(0, known - self.rule.block)
            origin = None if self.origin is None else self.origin[first:]
            cosine, entry = nearest(plain, self._plain(self.entries[first:], origin))
            alike = cosine > self.rule.threshold
            index[alike] = first + entry[alike]
        rest = (index < 0).nonzero()[:, 0]
        graph = likeness_graph(plain[rest], self.rule.threshold)
        owner = greedy_cover(graph, None if weights is None else weights[rest], self.rule.covered)
        chosen, number = torch.unique(owner, return_inverse=True)
        index[rest] = number + known
        fresh = rest[chosen]
        entries = x[fresh] if self.entries is None else torch.cat([self.entries, x[fresh]])
        origin = places[fresh].to(torch.int32)
        if self.origin is not None:
            origin = torch.cat([self.origin, origin])
        length = entries[index].float().norm(dim=-1)
        ratio = torch.where(length > 0, x.float().norm(dim=-1) / length, 1.0)
        own = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        own[fresh] = index[fresh] == torch.arange(known, known + len(fresh), device=x.device)
        ratio[own] = 1.0
        self.entries = entries.contiguous()
        self.index = _joined(self.index, index, len(entries))
        self.ratio = torch.cat([self.ratio.to(x), ratio.to(x.dtype)])
        if self.rotary is not None:
            self.origin = origin
            turns = places - origin[index]
            self._farthest = max(self._farthest, int(turns.abs().max()))
            before = torch.empty(0) if self.turns is None else self.turns
            self.turns = _joined(before, turns, self._farthest)

    def _plain(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Keys as they were before rotation, values as they are; float32."""
        if self.rotary is None:
            return x.float()
        assert places is not None
        return turn_back(x.float()[:, None], *self.rotary(places.long()))[:, 0]

    def codes(self) -> Codes:
        """What attention reads; shares the storages. Made once for each state."""
        if self._codes is None:
            assert self.entries is not None
            steps = None if self.rotary is None else self.rotary.steps(self._farthest + 1)
            self._codes = Codes(self.entries, self.index, self.ratio, self.turns, steps)
        return self._codes

    def rebuild(self) -> Tensor:
        """All vectors, in the entries' dtype ``[n, dim]``."""
        return rebuild(self.codes())

    def mix(self, weights: Tensor) -> Tensor:
        """``weights @ rebuild()`` of values, ``[..., n]`` -> float32 ``[..., dim]``, without
        building them: the weights of each entry's tokens are added up first (exact, ours)."""
        assert self.entries is not None
        scaled = weights.float() * self.ratio.float()
        bins = scaled.new_zeros((*weights.shape[:-1], len(self.entries)))
        bins.index_add_(-1, self.index.long(), scaled)
        mixed: Tensor = bins @ self.entries.float()
        return mixed

    def taken(self, kept: Tensor) -> Codebook:
        """A book of its own of the vectors ``kept``, int64 ascending, and the entries they use."""
        assert self.entries is not None
        made = copy.copy(self)
        used, index = torch.unique(self.index[kept].long(), return_inverse=True)
        made.entries, made.index = self.entries[used], index.to(self.index.dtype)
        made.ratio, made._codes = self.ratio[kept], None
        if self.rotary is not None:
            assert self.turns is not None
            assert self.origin is not None
            made.turns, made.origin = self.turns[kept], self.origin[used]
        return made

    def cut(self, tokens: int, entries: int) -> None:
        """Forget all but the first ``tokens`` vectors and ``entries`` entries."""
        assert self.entries is not None
        self._codes = None
        self.entries = self.entries[:entries].clone()
        self.index, self.ratio = self.index[:tokens].clone(), self.ratio[:tokens].clone()
        if self.rotary is not None:
            assert self.turns is not None
            assert self.origin is not None
            self.turns, self.origin = self.turns[:tokens].clone(), self.origin[:entries].clone()

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = (self.entries, self.index, self.ratio, self.turns, self.origin)
        return [x for x in held if x is not None]


def _joined(old: Tensor, new: Tensor, most: int) -> Tensor:
    """``new`` behind ``old`` in the smallest integers that hold ``most`` and what is there."""
    dtype = torch.int16 if most < 2**15 and old.dtype != torch.int32 else torch.int32
    new = new.to(dtype)
    return torch.cat([old.to(dtype), new]) if len(old) else new

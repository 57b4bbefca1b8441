"""Eviction the slow way: nothing is freed, a mask hides what was dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.cache.budget import Choice
from narrows.contracts import LayerCache


class MaskedLayer(LayerCache):
    """All keys and values for ever, in float64; ``choice`` says what each query head sees of the
    prompt once it is sealed."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.prompt: int | None = None

    @property
    def length(self) -> int:
        return 0 if self.k is None else len(self.k)

    def append(self, k: Tensor, v: Tensor) -> None:
        k, v = k.double(), v.double()
        self.k = k if self.k is None else torch.cat([self.k, k])
        self.v = v if self.v is None else torch.cat([self.v, v])

    def seal(self) -> None:
        self.prompt = self.length

    def attend(self, q: Tensor, scale: float) -> Tensor:
        n, heads, _ = q.shape
        kv_heads = self.k.shape[1]
        out = torch.empty((n, heads, self.v.shape[2]), dtype=torch.float64)
        for head in range(heads):
            group, member = divmod(head, heads // kv_heads)
            seen = torch.ones(self.length, dtype=torch.bool)
            if self.prompt is not None:
                seen[: self.prompt] = False
                kept = self.choice.tokens[group]
                if self.choice.seen is not None:
                    kept = kept[self.choice.seen[group][member]]
                seen[kept] = True
            for row in range(n):
                upto = seen.clone()
                upto[self.length - n + row + 1 :] = False
                scores = (self.k[:, group] @ q[row, head].double()) * scale
                weights = scores.masked_fill(~upto, -torch.inf).softmax(0)
                out[row, head] = weights @ self.v[:, group]
        return out.to(q.dtype)

    def rollback(self, n: int) -> None:
        raise NotImplementedError

    def materialize(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    @property
    def nbytes(self) -> int:
        return 0

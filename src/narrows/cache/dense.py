"""The uncompressed cache: every key and value in the model's own precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from narrows.contracts import LayerCache, LayerShape, ModelShape, Span
from narrows.errors import ConfigError
from narrows.ops import ragged
from narrows.ops.attention import causal_attention
from narrows.ops.native import attention_dtype

BLOCK = 128
"""Buffers grow in whole blocks of tokens."""

ROLLBACK = 128
"""Tokens beyond the window a sliding layer still holds, so that they can come back into
sight after a rollback; no draft may be longer."""


FEW = 16
"""New tokens of a sequence up to which the kernel for ragged decoding is faster than SDPA."""


def capacity(tokens: int) -> int:
    """Tokens a buffer is given when it must hold ``tokens``: a quarter more, in whole blocks."""
    return -(-(tokens + tokens // 4) // BLOCK) * BLOCK


class DenseLayer(LayerCache):
    """Keys and values in two growing buffers ``[kv_heads, capacity, dim]``.

    A sliding-window layer frees tokens that no later query can see.
    """

    PLACED: ClassVar[int] = FEW

    _place: ragged.Place | None = None
    """Of the buffers there are."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.length = 0
        self.dropped = 0
        self.k = torch.empty((shape.kv_heads, 0, shape.key_dim), dtype=dtype, device=device)
        self.v = torch.empty((shape.kv_heads, 0, shape.value_dim), dtype=dtype, device=device)

    @property
    def held(self) -> int:
        """Tokens in the buffers."""
        return self.length - self.dropped

    def append(self, k: Tensor, v: Tensor) -> None:
        """See LayerCache. Grows the buffers when they are full."""
        n = k.shape[0]
        self.reserve(n)
        stop = self.held + n
        self.k[:, stop - n : stop] = k.transpose(0, 1)
        self.v[:, stop - n : stop] = v.transpose(0, 1)
        self.length += n

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_place": None}  # which holds addresses

    def reserve(self, n: int) -> None:
        """Make sure the buffers take ``n`` more tokens."""
        if self.held + n <= self.k.shape[1]:
            return
        self._place = None
        keep = self.held
        if self.shape.window is not None:
            keep = min(keep, self.shape.window - 1 + ROLLBACK)
        start = self.held - keep
        room = max(capacity(keep + n), BLOCK)
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_empty((old.shape[0], room, old.shape[2]))
            new[:, :keep] = old[:, start : self.held]
            new[:, keep + n :] = 0  # saved with the rest: nothing that stood there before
            setattr(self, name, new)
        self.dropped += start

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """See LayerCache."""
        k, v = self.k[:, : self.held], self.v[:, : self.held]
        dtype = attention_dtype(q, k.dtype)
        return causal_attention(q, k, v, scale, self.shape.window, dtype)

    @classmethod
    def step(
        cls,
        caches: Sequence[LayerCache],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Sequence[Span],
        scale: float,
    ) -> Tensor:
        """See LayerCache. On the CPU all sequences with few new tokens go in one kernel call."""
        few = [(c, s) for c, s in zip(caches, spans, strict=True) if s[1] - s[0] <= FEW]
        if not few or not ragged.supported(q, caches[0].k):  # type: ignore[attr-defined]
            return super().step(caches, q, k, v, spans, scale)
        if len(few) == len(caches):
            return cls._step_few(few, q, k, v, scale)
        out = q.new_empty((*q.shape[:2], v.shape[2]))
        done = cls._step_few(few, q, k, v, scale)
        for _, (a, b) in few:
            out[a:b] = done[a:b]
        for cache, (a, b) in zip(caches, spans, strict=True):
            if b - a > FEW:
                cache.append(k[a:b], v[a:b])
                out[a:b] = cache.attend(q[a:b], scale)
        return out

    @staticmethod
    def _step_few(
        few: list[tuple[LayerCache, Span]], q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        places = []
        for cache, (a, b) in few:
            assert isinstance(cache, DenseLayer)
            places.append(cache.place(a, b - a))
        window = few[0][0].shape.window  # type: ignore[attr-defined]
        return ragged.append_attend(places, q, k, v, scale, window)

    def place(self, first_row: int, rows: int) -> ragged.Place:
        """See LayerCache. Grows the buffers when they are full."""
        place = self._place
        if place is None or self.length - self.dropped + rows > place.capacity:
            self.reserve(rows)
            place = self._place = ragged.Place(self.k, self.v)
        self.length += rows
        return place.at(self.length - self.dropped, first_row, rows)

    def rollback(self, n: int) -> None:
        """See LayerCache. A sliding layer can give back at most ROLLBACK tokens once it has
        freed any; more raises ValueError."""
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot roll back {n} of {self.length} tokens")
        if self.dropped and n > ROLLBACK:
            raise ValueError(
                f"a sliding-window layer cannot roll back {n} tokens (at most {ROLLBACK})"
            )
        self.length -= n

    def materialize(self) -> tuple[Tensor, Tensor]:
        """See LayerCache; a sliding layer gives what it still holds."""
        k, v = self.k[:, : self.held], self.v[:, : self.held]
        return k.transpose(0, 1), v.transpose(0, 1)

    @property
    def nbytes(self) -> int:
        """See LayerCache."""
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()


@dataclass(frozen=True, slots=True)
class DensePolicy:
    """Every layer dense: exact, and the yardstick of every other policy."""

    rehearses: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        """See CachePolicy."""
        return "dense"

    def holding(self, tokens: int) -> DensePolicy:
        """See CachePolicy. Raises ConfigError for more than sliding layers keep."""
        if tokens > ROLLBACK:
            raise ConfigError(f"no more than {ROLLBACK} tokens can be drafted (given: {tokens})")
        return self

    def build(self, shape: ModelShape) -> list[LayerCache]:
        """See CachePolicy."""
        return [DenseLayer(layer, shape.dtype, shape.device) for layer in shape.layers]

    def estimate(self, shape: ModelShape, tokens: int, prompt: int | None = None) -> int:
        """See CachePolicy. Sliding layers are counted as full ones while a prompt is read."""
        a_token = sum(layer.numbers for layer in shape.layers)
        return max(capacity(tokens), BLOCK) * a_token * shape.dtype.itemsize

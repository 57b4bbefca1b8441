"""The uncompressed cache: every key and value in the model's own precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from narrows.contracts import LayerCache, LayerShape, ModelShape
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

    def ready(self, n: int) -> bool:
        """See LayerCache."""
        return n <= FEW

    def places(self, first_row: int, rows: int) -> Sequence[ragged.Place]:
        """See LayerCache. One. Grows the buffers when they are full."""
        # Asked of every layer of every sequence at each step, so it looks at no tensor.
        place = self._place
        if place is None or self.length - self.dropped + rows > place.capacity:
            self.reserve(rows)
            place = self._place = ragged.Place(self.k, self.v, window=self.shape.window)
        self.length += rows
        return (place.at(self.length - self.dropped, first_row, rows),)

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

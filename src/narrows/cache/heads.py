"""Keys and values of KV heads that hold different tokens: what an evicting layer keeps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narrows.cache.budget import Choice
from narrows.cache.codebook import Codebook
from narrows.ops import ragged
from narrows.ops.attention import causal_attention
from narrows.ops.native import attention_dtype

GROWTH = 16
"""Buffers grow by so many tokens, or about a sixteenth: a step reads all of a buffer anyway, so
copying it now and then costs little, and a small cache is not hidden behind its slack."""


class HeadStore:
    """Keys and values of KV heads that hold different tokens, one buffer ``[1, capacity, dim]`` a
    head and side.

    ``held`` counts a head's tokens. ``books`` may stand for the first of a side's, whose buffer
    then begins behind them. ``seen`` int16 ``[n]`` says of a head's first tokens, a bit each,
    which of its query heads see them; they all see the rest.
    """

    def __init__(self, k: Tensor, v: Tensor, choice: Choice) -> None:
        """Copies what ``choice`` keeps of ``k`` and ``v`` ``[kv_heads, n, dim]``."""
        self.held = [len(tokens) for tokens in choice.tokens]
        self.k, self.v = (
            [_buffer(x[head, tokens]) for head, tokens in enumerate(choice.tokens)] for x in (k, v)
        )
        self.books: list[list[Codebook | None]] = [[None] * len(self.held) for _ in range(2)]
        self._spare = 0
        """Tokens that every buffer takes without growing, at least."""
        self._fixed: list[ragged.Place] | None = None
        self.seen = None if choice.seen is None else [_bits(seen) for seen in choice.seen]

    def coded(self, side: int, head: int) -> int:
        """Tokens of a head that a book stands for; side 0 are keys, 1 values."""
        book = self.books[side][head]
        return 0 if book is None else len(book)

    def dense(self, side: int, head: int) -> Tensor:
        """The others ``[1, n, dim]``."""
        buffer = (self.k, self.v)[side][head]
        return buffer[:, : self.held[head] - self.coded(side, head)]

    def put(self, side: int, head: int, x: Tensor) -> None:
        """Make ``x`` ``[n, dim]`` all that is held besides the book's."""
        (self.k, self.v)[side][head] = _buffer(x)
        self._spare, self._fixed = 0, None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens ``[n, kv_heads, dim]`` to every head."""
        if not len(k):
            return
        self.grow(len(k))
        for head in range(len(self.held)):
            self.dense(0, head)[0, -len(k) :] = k[:, head]
            self.dense(1, head)[0, -len(k) :] = v[:, head]

    def grow(self, n: int) -> None:
        """Count ``n`` more tokens of every head, and make sure the buffers take them."""
        if n > self._spare:
            spare = []
            for side, buffers in enumerate((self.k, self.v)):
                for head, buffer in enumerate(buffers):
                    used = self.held[head] - self.coded(side, head)
                    if used + n > buffer.shape[1]:
                        buffers[head] = buffer = _buffer(buffer[0, :used], n)
                    spare.append(buffer.shape[1] - used)
            self._spare, self._fixed = min(spare), None
        self._spare -= n
        self.held = [held + n for held in self.held]

    def drop(self, n: int) -> None:
        """Forget the newest ``n`` tokens of every head, which no book stands for."""
        self._spare += n
        self.held = [held - n for held in self.held]

    def thinned(self, kept: Sequence[Tensor]) -> HeadStore:
        """A store of its own that holds of each head only the tokens ``kept``, int64 ascending."""
        made = copy.copy(self)
        made.held = [len(tokens) for tokens in kept]
        made.k, made.v, made.books = [], [], [[], []]
        for side, buffers in enumerate((made.k, made.v)):
            for head, tokens in enumerate(kept):
                book, coded = self.books[side][head], self.coded(side, head)
                old = tokens < coded
                made.books[side].append(None if book is None else book.taken(tokens[old]))
                buffers.append(_buffer(self.dense(side, head)[0, tokens[~old] - coded]))
        if self.seen is not None:
            made.seen = [s[t[t < len(s)]] for s, t in zip(self.seen, kept, strict=True)]
        made._spare, made._fixed = 0, None
        return made

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """See LayerCache."""
        group = q.shape[1] // len(self.held)
        dtype = attention_dtype(q, self.k[0].dtype)
        outs = []
        for head in range(len(self.held)):
            rows = q[:, head * group : (head + 1) * group]
            k, v = self.dense(0, head), self.dense(1, head)
            if self.seen is None and not (self.coded(0, head) or self.coded(1, head)):
                outs.append(causal_attention(rows, k, v, scale, None, dtype))
            else:
                outs.append(self._attend_head(head, rows, scale))
        return torch.cat(outs, 1)

    def _attend_head(self, head: int, q: Tensor, scale: float) -> Tensor:
        """Attention, in float32, where a book or a mask has a say. The weights of coded values
        are added up by entry."""
        keys, values = self.books[0][head], self.books[1][head]
        k, v = self.dense(0, head)[0].float(), self.dense(1, head)[0].float()
        if keys is not None:
            k = torch.cat([keys.rebuild().float(), k])
        seen = None if self.seen is None else self.seen[head]
        weights = ragged.seen_weights(q, k, scale, seen)
        coded = self.coded(1, head)
        mixed = weights[..., coded:] @ v
        if values is not None:
            mixed = mixed + values.mix(weights[..., :coded])
        return mixed.transpose(0, 1).to(q.dtype)

    def places(self, first_row: int, rows: int) -> list[ragged.Place]:
        """What the kernel for few new tokens reads of each head; ``rows`` have been counted."""
        if self._fixed is None:
            self._fixed = [self._place(head) for head in range(len(self.held))]
        for place, held in zip(self._fixed, self.held, strict=True):
            place.at(held, first_row, rows)
        return self._fixed

    def _place(self, head: int) -> ragged.Place:
        """What is the same in every step until a buffer or a book changes."""
        keys, values = self.books[0][head], self.books[1][head]
        return ragged.Place(
            self.k[head],
            self.v[head],
            k_codes=None if keys is None else keys.codes(),
            v_codes=None if values is None else values.codes(),
            seen=None if self.seen is None else self.seen[head],
            head=head,
        )

    def whole(self, side: int, head: int) -> Tensor:
        """All of a head's keys or values, dense ``[n, dim]``."""
        book = self.books[side][head]
        dense = self.dense(side, head)[0]
        return dense if book is None else torch.cat([book.rebuild(), dense])

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadStore:
        made = copy.copy(self)
        made.k, made.v = ([x.clone() for x in side] for side in (self.k, self.v))
        made.books = copy.deepcopy(self.books, memo)
        made.held, made._fixed = list(self.held), None  # which holds addresses
        return made

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        every = [*self.k, *self.v, *(self.seen or ())]
        for book in (book for side in self.books for book in side if book is not None):
            every += book.tensors
        return sum(x.untyped_storage().nbytes() for x in every)


def _bits(seen: Tensor) -> Tensor:
    """Bool ``[group, n]`` as bits of int16 ``[n]``."""
    heads = torch.arange(len(seen), device=seen.device)[:, None]
    return (seen.to(torch.int32) << heads).sum(0).to(torch.int16)


def _buffer(x: Tensor, more: int = 0) -> Tensor:
    """``x`` ``[n, dim]`` copied into a buffer that has room for ``more`` tokens and some."""
    made = x.new_empty((1, room(len(x) + more), x.shape[1]))
    made[0, : len(x)] = x
    made[0, len(x) + more :] = 0  # saved with the rest: nothing that stood there before
    return made


def room(tokens: int) -> int:
    """Tokens a buffer is given when it must hold ``tokens``."""
    return -(-tokens // step(tokens)) * step(tokens)


def step(tokens: int) -> int:
    """Tokens by which a buffer of ``tokens`` grows: a power of two, so that more tokens never get
    less room."""
    return GROWTH << max(0, (tokens // GROWTH**2).bit_length() - 1)

"""One side of a sealed quantised layer: first tokens dense, then codes, then the newest dense."""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.cache.codes import Codes
from narrows.cache.plan import QuantOptions, folded, tail_room


class Stretch:
    """Keys or values of a sealed layer: the sink, the codes, and the dense tail behind them.

    ``originals`` are the newest quantised tokens as they were, as many as a rollback of ``hold``
    tokens takes out of the codes again.
    """

    def __init__(self, codes: Codes, rule: str, options: QuantOptions, x: Tensor) -> None:
        """``x`` are all tokens so far, dense: ``[heads, n, dim]``."""
        self.codes, self.rule, self.options = codes, rule, options
        self.sink = x[:, : options.sink].clone()
        self.length = x.shape[1]
        self.tail = self.originals = x.new_empty((x.shape[0], 0, x.shape[2]))
        start, done = self.sink.shape[1], folded(options, rule, self.length)
        if done:
            codes.fold(x[:, start : start + done])
        self._keep(x[:, start + done :])
        self._remember(x[:, start : start + done])

    @property
    def tail_tokens(self) -> int:
        """Dense tokens behind the quantised ones."""
        return self.length - self.sink.shape[1] - self.codes.tokens

    def can_forget(self, n: int) -> bool:
        """Whether the newest ``n`` tokens can be dropped as if they had never been there."""
        back = self.codes.tokens - folded(self.options, self.rule, self.length - n)
        return 0 <= n <= self.length and back <= self.originals.shape[1]

    def forget(self, n: int) -> None:
        """Drop the newest ``n`` tokens, and quantise no more than a sequence without them has."""
        before = self.codes.tokens
        self.length -= n
        if self.length < self.sink.shape[1]:
            self.sink = self.sink[:, : self.length].clone()
        stop = self.length - self.sink.shape[1]
        done = folded(self.options, self.rule, self.length)
        if done >= before:
            return
        first = self.originals.shape[1] - (before - done)
        dense = torch.cat([self.originals[:, first:], self.tail[:, : max(0, stop - before)]], 1)
        self.codes.cut(done)
        self._keep(dense[:, : stop - done])
        self.originals = self.originals[:, :first].clone()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        dense = (self.sink, self.tail, self.originals)
        return self.codes.nbytes + sum(x.untyped_storage().nbytes() for x in dense)

    @property
    def sink_room(self) -> int:
        """Tokens the sink still lacks."""
        return self.options.sink - self.sink.shape[1]

    def append(self, x: Tensor) -> None:
        """Add tokens ``[heads, n, dim]`` to the tail, or to a sink that is not full yet."""
        room = self.sink_room
        if room:
            self.sink = torch.cat([self.sink, x[:, :room]], 1)
            self.length += min(room, x.shape[1])
            x = x[:, room:]
        n = x.shape[1]
        if n:
            self.grow(n)
            self.tail[:, self.tail_tokens - n : self.tail_tokens] = x

    def grow(self, n: int) -> None:
        """Count ``n`` more tokens, and make sure the tail takes them; the sink must be full."""
        used = self.tail_tokens
        if used + n > self.tail.shape[1]:
            self._keep(self.tail[:, :used], used + n)
        self.length += n

    def fold(self) -> bool:
        """Quantise what has left the residual. Whether storages have been replaced for that."""
        n = folded(self.options, self.rule, self.length) - self.codes.tokens
        if n <= 0 and not self.options.hold:
            return False
        gone = self.tail[:, : max(0, n)]
        if self.options.hold:
            gone = gone.clone()
        used = self.tail_tokens
        anew = n > 0 and not (n == 1 and self.codes.take(self.tail[:, :used]))
        if anew:
            rest = self.tail[:, n:used].clone()
            self.codes.fold(gone)
            self._keep(rest)
        self._remember(gone)
        return anew

    def _remember(self, gone: Tensor) -> None:
        """Keep of the originals, with ``gone`` behind them, what a rollback may ask for."""
        if not self.options.hold:
            return
        least = folded(self.options, self.rule, self.length - self.options.hold)
        n = max(0, self.codes.tokens - least)
        if gone.shape[1] or n != self.originals.shape[1]:
            together = torch.cat([self.originals, gone], 1)
            self.originals = together[:, max(0, together.shape[1] - n) :].clone()

    def _keep(self, x: Tensor, least: int = 0) -> None:
        """Make ``x`` the tail, in a buffer as ``layer_bytes`` counts it."""
        room = tail_room(self.options, self.rule) if x.shape[1] or least else 0
        room = max(room, least, x.shape[1])
        if room != self.tail.shape[1] or not room:
            self.tail = x.new_zeros((x.shape[0], room, x.shape[2]))
        self.tail[:, : x.shape[1]] = x

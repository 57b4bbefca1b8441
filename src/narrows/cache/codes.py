"""The quantised tokens of one layer: packed codes with their scales and zeros, growing."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from narrows.cache.plan import META_DTYPES, SECOND_LEVEL, Meta
from narrows.errors import NumericalError
from narrows.ops import quant
from narrows.ops.fold import fold_value
from narrows.ops.packed import Coarse, Numbers
from narrows.ops.quant import QUAD, Fit


class Metadata(ABC):
    """Scales or zeros ``[heads, blocks, many]``, a row of ``many`` for every block of tokens."""

    @abstractmethod
    def put(self, first: int, values: Tensor, room: int) -> None:
        """Write float32 ``[heads, rows, many]`` at rows ``first`` on, holding ``room`` rows."""

    @abstractmethod
    def cut(self, rows: int, room: int) -> None:
        """Forget all but the first ``rows`` rows, holding ``room`` rows."""

    @abstractmethod
    def numbers(self, width: int) -> Numbers:
        """The rows as ``[heads, n, width]``, as attention reads them."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""


class Plain(Metadata):
    """In a floating-point type."""

    def __init__(self, heads: int, many: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros((heads, 0, many), dtype=dtype, device=device)

    def put(self, first: int, values: Tensor, room: int) -> None:
        """See Metadata."""
        self.values = _grown(self.values, room)
        self.values[:, first : first + values.shape[1]] = values

    def cut(self, rows: int, room: int) -> None:
        """See Metadata."""
        self.values = self.values[:, :room].clone()
        self.values[:, rows:] = 0

    def numbers(self, width: int) -> Tensor:
        """See Metadata. A row of these is what is kept for one block."""
        return self.values

    @property
    def nbytes(self) -> int:
        """See Metadata."""
        return self.values.untyped_storage().nbytes()


class SecondLevel(Metadata):
    """Coded in a few bits against a float16 minimum and step of their row."""

    def __init__(self, heads: int, many: int, bits: int, device: torch.device) -> None:
        self.bits = bits
        self.codes = torch.zeros((heads, 0, many * bits // 8), dtype=torch.uint8, device=device)
        self.step = torch.zeros((heads, 0), dtype=torch.float16, device=device)
        self.low = torch.zeros((heads, 0), dtype=torch.float16, device=device)

    def put(self, first: int, values: Tensor, room: int) -> None:
        """See Metadata. Rows come one after the other."""
        coded = quant.quantise(values, self.bits)
        packed = quant.pack(coded.codes, self.bits)
        self.codes = torch.cat([self.codes[:, :first], packed], 1)
        self.step = torch.cat([self.step[:, :first], coded.scale.half()], 1)
        self.low = torch.cat([self.low[:, :first], coded.zero.half()], 1)

    def cut(self, rows: int, room: int) -> None:
        """See Metadata."""
        kept = (x[:, :rows].clone() for x in (self.codes, self.step, self.low))
        self.codes, self.step, self.low = kept

    def numbers(self, width: int) -> Coarse:
        """See Metadata."""
        return Coarse(self.codes, self.step, self.low, self.bits, width)

    @property
    def nbytes(self) -> int:
        """See Metadata."""
        return sum(x.untyped_storage().nbytes() for x in (self.codes, self.step, self.low))


def _metadata(meta: Meta, heads: int, many: int, device: torch.device) -> Metadata:
    if meta in SECOND_LEVEL:
        return SecondLevel(heads, many, SECOND_LEVEL[meta], device)
    return Plain(heads, many, META_DTYPES[meta], device)


def _grown(x: Tensor, rows: int) -> Tensor:
    """``x`` ``[heads, n, ...]`` with room for ``rows``, zeros added."""
    if rows <= x.shape[1]:
        return x
    return torch.cat([x, x.new_zeros((x.shape[0], rows - x.shape[1], *x.shape[2:]))], 1)


class Codes(ABC):
    """Quantised keys or values of one layer, for tokens 0 to ``tokens``.

    A borrower has no ``lines`` and reads its ``owner``'s, as far as its own ``tokens`` go. Scale
    is None where it is zero throughout (``fit`` "mean").
    """

    def __init__(
        self,
        what: str,
        *,
        heads: int,
        dim: int,
        bits: int,
        eta: float,
        group: int,
        block: int,
        meta: Meta,
        owner: Codes | None,
        fit: Fit,
        device: torch.device,
    ) -> None:
        self.what = what
        self.heads, self.dim, self.bits, self.eta = heads, dim, bits, eta
        self.group, self.block, self.owner, self.fit = group, block, owner, fit
        self.tokens = 0
        self.lines: Tensor | None = None if owner else self._no_lines(device)
        many = self._many(meta)
        self.zero = _metadata(meta, heads, many, device)
        mean = owner is not None and fit == "mean"
        self.scale = None if mean else _metadata(meta, heads, many, device)

    @property
    def borrowed(self) -> Tensor | None:
        """The stored codes this reads, its own or its owner's; None where they have no part."""
        if self.scale is None:
            return None
        return self.lines if self.owner is None else self.owner.lines

    @property
    def nbytes(self) -> int:
        """Bytes held by this layer: codes only if it owns them."""
        own = 0 if self.lines is None else self.lines.untyped_storage().nbytes()
        return own + self.zero.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def fold(self, x: Tensor) -> None:
        """Quantise the next tokens ``[heads, n, dim]``. Raises NumericalError if they are not
        finite, or too large for the type of scale and zero."""
        first, n = self.tokens, x.shape[1]
        groups = self._groups(x.float())
        codes = None
        if self.owner is None:
            codes, scale, zero = quant.quantise(groups, self.bits, self.eta)
        else:
            # Its lines may have room, zeros, for tokens that it has not written.
            assert self.owner.tokens >= first + n, f"{self.what}: the owner is behind"
            borrowed = self._groups(self.owner.codes(first, first + n))
            scale, zero = quant.borrow(borrowed, groups, self.bits, self.fit, self.eta)
        pairs = ((scale, self.scale), (zero, self.zero))
        new = [(held, self._rows(values)) for values, held in pairs if held is not None]
        for held, rows in new:  # before anything is written
            self._check(held, rows)
        if codes is not None:
            self._put_lines(first, codes)
        for held, rows in new:
            held.put(self._row(first), rows, self._row(self._room(first + n)))
        self.tokens += n

    def take(self, tail: Tensor) -> bool:
        """As ``fold`` of the first token of ``tail`` ``[heads, n, dim]``, whose others move up by
        one place, in one call. False, and nothing done, where that cannot be."""
        return False

    def cut(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` tokens, and the room behind them. Whole groups for
        keys, whole blocks where scale and zero are coded."""
        if self.lines is not None:
            self._cut_lines(tokens)
        for held in (self.scale, self.zero):
            if held is not None:
                held.cut(self._row(tokens), self._row(self._room(tokens)))
        self.tokens = tokens

    def scales(self) -> Numbers | None:
        """Scale of every group, as ``PackedLayer`` has it."""
        return None if self.scale is None else self.scale.numbers(self._width())

    def zeros(self) -> Numbers:
        """Zero of every group, as ``PackedLayer`` has it."""
        return self.zero.numbers(self._width())

    def _check(self, held: Metadata, rows: Tensor) -> None:
        limit = torch.finfo(torch.float16 if not isinstance(held, Plain) else held.values.dtype).max
        if not bool((rows.abs() <= limit).all()):
            raise NumericalError(
                f"{self.what} cannot be quantised: they are not finite, or too large for the "
                "metadata type (try key_meta or value_meta bf16)"
            )

    @abstractmethod
    def codes(self, first: int, stop: int) -> Tensor:
        """Own codes of tokens ``[first, stop)``: uint8 ``[heads, n, dim]``."""

    @abstractmethod
    def _no_lines(self, device: torch.device) -> Tensor: ...

    @abstractmethod
    def _put_lines(self, first: int, grouped: Tensor) -> None: ...

    @abstractmethod
    def _cut_lines(self, tokens: int) -> None: ...

    @abstractmethod
    def _many(self, meta: Meta) -> int: ...

    @abstractmethod
    def _row(self, token: int) -> int: ...

    @abstractmethod
    def _rows(self, values: Tensor) -> Tensor: ...

    @abstractmethod
    def _width(self) -> int: ...

    @abstractmethod
    def _room(self, tokens: int) -> int: ...

    @abstractmethod
    def _groups(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _from_groups(self, x: Tensor) -> Tensor: ...


class KeyCodes(Codes):
    """Per channel: a group is ``group`` tokens of a channel. Tokens come in whole groups.

    ``lines`` as ``quant.key_lines``; scale and zero ``[heads, tokens / group, dim]``.
    """

    def codes(self, first: int, stop: int) -> Tensor:
        """See Codes; bounds are multiples of 16."""
        assert self.lines is not None
        return quant.key_codes(self.lines[:, first // 16 : stop // 16], self.bits)

    def _no_lines(self, device: torch.device) -> Tensor:
        shape = (self.heads, 0, self.dim // QUAD, 8 * self.bits)
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def _put_lines(self, first: int, grouped: Tensor) -> None:
        assert self.lines is not None
        new = quant.key_lines(self._from_groups(grouped), self.bits)
        self.lines = torch.cat([self.lines[:, : first // 16], new], 1)

    def _cut_lines(self, tokens: int) -> None:
        assert self.lines is not None
        self.lines = self.lines[:, : tokens // 16].clone()

    def _many(self, meta: Meta) -> int:
        return self.dim

    def _row(self, token: int) -> int:
        return token // self.group

    def _rows(self, values: Tensor) -> Tensor:
        return values

    def _width(self) -> int:
        return self.dim

    def _room(self, tokens: int) -> int:
        return tokens

    def _groups(self, x: Tensor) -> Tensor:
        return quant.key_groups(x, self.group)

    def _from_groups(self, x: Tensor) -> Tensor:
        return quant.from_key_groups(x)


class ValueCodes(Codes):
    """Per token: a group is ``group`` channels of a token. Tokens come in any number, but in whole
    blocks where scale and zero are coded. Room is made ``block`` tokens at a time.

    ``lines`` as ``quant.value_lines``; scale and zero ``[heads, tokens, dim / group]``.
    """

    def take(self, tail: Tensor) -> bool:
        """See Codes: where there is room, and the numbers are its own."""
        scale, zero = self.scale, self.zero
        if not isinstance(scale, Plain) or not isinstance(zero, Plain):
            return False
        if self.tokens % self.block == 0 or (self.owner is not None and self.fit != "minmax"):
            return False
        held = scale.values, zero.values
        done = fold_value(tail, self.bits, self.eta, self.lines, *held, self.tokens)
        self.tokens += done
        return done

    def codes(self, first: int, stop: int) -> Tensor:
        """See Codes."""
        assert self.lines is not None
        start = first // QUAD
        wide = quant.value_codes(self.lines[:, start : -(-stop // QUAD)], self.bits)
        return wide[:, first - start * QUAD : stop - start * QUAD]

    def _no_lines(self, device: torch.device) -> Tensor:
        shape = (self.heads, 0, self.dim // 16, 8 * self.bits)
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def _room(self, tokens: int) -> int:
        return -(-tokens // self.block) * self.block

    def _put_lines(self, first: int, grouped: Tensor) -> None:
        assert self.lines is not None
        codes = self._from_groups(grouped)
        start, stop = first // QUAD, -(-(first + codes.shape[1]) // QUAD)
        self.lines = _grown(self.lines, self._room(first + codes.shape[1]) // QUAD)
        padded = codes.new_zeros((self.heads, (stop - start) * QUAD, self.dim))
        padded[:, first - start * QUAD : first - start * QUAD + codes.shape[1]] = codes
        # Tokens of the first quad that came earlier stay; the places of later ones are zero.
        self.lines[:, start:stop] |= quant.value_lines(padded, self.bits)

    def _cut_lines(self, tokens: int) -> None:
        assert self.lines is not None
        start, room = tokens // QUAD, self._room(tokens) // QUAD
        last = self.codes(start * QUAD, tokens)  # of a quad that stays in part
        self.lines = self.lines[:, :room].clone()
        self.lines[:, start:] = 0
        if last.shape[1]:
            padded = last.new_zeros((self.heads, QUAD, self.dim))
            padded[:, : last.shape[1]] = last
            self.lines[:, start : start + 1] = quant.value_lines(padded, self.bits)

    def _many(self, meta: Meta) -> int:
        groups = self.dim // self.group
        return groups * self.block if meta in SECOND_LEVEL else groups

    def _row(self, token: int) -> int:
        return token // self.block if isinstance(self.zero, SecondLevel) else token

    def _rows(self, values: Tensor) -> Tensor:
        if isinstance(self.zero, SecondLevel):
            return values.reshape(self.heads, -1, self.block * values.shape[2])
        return values

    def _width(self) -> int:
        return self.dim // self.group

    def _groups(self, x: Tensor) -> Tensor:
        return quant.value_groups(x, self.group)

    def _from_groups(self, x: Tensor) -> Tensor:
        return x.flatten(-2)

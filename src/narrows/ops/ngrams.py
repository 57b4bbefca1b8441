"""How a text may go on, by its last few tokens; see ``ngrams.c``."""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_left

import torch
from torch import Tensor

from narrows.ops.native import library

ONCE, ALIKE, APART = range(3)
"""What is known of how a text went on behind a run of tokens: it was there once, or went on alike
the last two times, or not."""


def repeats(
    text: array[int], shortest: int, longest: int, far: int, most: int
) -> tuple[int, int, array[int]]:
    """How many of the last tokens of ``text`` (of type code i) stood together in it before, 0 if
    not even ``shortest``; the place behind them; and of each of ``most`` tokens from there, as far
    as there are some, how it followed those before it as far as they match by then, at most
    ``longest``: ONCE, ALIKE or APART. The longest match counts, up to ``longest``, of several the
    last; how far that one goes on is told up to ``far``."""
    native = library()
    if native is None:
        return repeats_plain(text, shortest, longest, far, most)
    found = array("q", bytes(8 * (1 + most)))
    size = native.repeats(
        *(text.buffer_info()[0], len(text), shortest, longest, far, most),
        found.buffer_info()[0],
    )
    behind = found[0]
    return size, behind, found[1 : 1 + len(text) - behind] if size else found[:0]


def repeats_plain(
    text: array[int], shortest: int, longest: int, far: int, most: int
) -> tuple[int, int, array[int]]:
    """The definition of ``repeats``."""
    count, told = len(text), text.tobytes()

    def earlier(stop: int, size: int) -> int:
        """The last place before ``stop`` behind the same ``size`` tokens, or -1."""
        run, end = told[4 * (stop - size) : 4 * stop], 4 * (stop - 1)
        while (at := told.rfind(run, 0, end)) % 4 and at >= 0:  # between tokens
            end = at + len(run) - 1
        return at // 4 + size if at >= 0 else -1

    size, behind = 0, 0
    for run in range(shortest, min(longest, count - 1) + 1):
        at = earlier(count, run)
        if at < 0:
            break
        size, behind = run, at
    went = array("q")
    if not size:
        return 0, 0, went
    for i in range(min(most, count - behind)):
        before = earlier(behind + i, min(size + i, longest))
        alike = before >= 0 and text[before] == text[behind + i]
        went.append(ONCE if before < 0 else ALIKE if alike else APART)
    if size == longest:  # else no more can match, or a longer one had been found
        while size < min(far, behind) and text[behind - size - 1] == text[count - size - 1]:
            size += 1
    return size, behind, went


MIX = 0x1E3779B97F4A7C15
"""Odd, so that no token is lost from a run's key."""
MASK = (1 << 63) - 1


def longer_key(key: int, token: int) -> int:
    """The key of a run and ``token`` before it, from the run's own, which is 0 of none. Two runs
    have the same by rare accident."""
    return (key * MIX + token + 1) & MASK


class _Table(ctypes.Structure):
    """As in ngrams.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "parts", "tokens", "sorts", "chances")),
        ("shift", ctypes.c_int64),
    ]


class Runs:
    """Runs of tokens by their ``keys`` int64 ``[N]``, which rise. Behind each stands the likeliest
    of ``tokens`` int32 ``[N]``, a guess of the sort ``sorts`` uint8 ``[N]``, which is right with
    one of ``chances`` float32 ``[S]``. A run stands there only if its own ends do."""

    def __init__(self, keys: Tensor, tokens: Tensor, sorts: Tensor, chances: Tensor) -> None:
        bits = max(1, len(keys).bit_length())
        shift = MASK.bit_length() - bits
        edges = torch.arange(1 << bits) << shift
        parts = torch.cat([torch.searchsorted(keys, edges), torch.tensor([len(keys)])]).int()
        held = {"keys": keys, "parts": parts, "tokens": tokens, "sorts": sorts, "chances": chances}
        self._held = {name: x.contiguous() for name, x in held.items()}
        self._told = _Table(**{name: x.data_ptr() for name, x in self._held.items()}, shift=shift)
        self._address = ctypes.addressof(self._told)
        self._keys = self._held["keys"].numpy().data
        self._chances = chances.tolist()
        self.tokens, self.sorts = (self._held[name].numpy().data for name in ("tokens", "sorts"))

    def behind(self, text: array[int], longest: int, most: int, least: float) -> array[int]:
        """Where guesses stand that go on from ``text`` (of type code i), at most ``most``: each
        what follows the longest run known, of up to ``longest`` tokens, that ends there, as long
        as one is and its chance is at least ``least``."""
        native = library()
        if native is None:
            return self.behind_plain(text, longest, most, least)
        text, places = text + array("i", bytes(4 * most)), array("q", bytes(8 * most))
        count = native.phrases(
            *(self._address, text.buffer_info()[0], len(text) - most, longest, most, least),
            places.buffer_info()[0],
        )
        return places[:count]

    def behind_plain(self, text: array[int], longest: int, most: int, least: float) -> array[int]:
        """The definition of ``behind``."""
        text, places = text[:], array("q")
        while len(places) < most:
            found, key = None, 0
            for token in reversed(text[-longest:]):
                key = longer_key(key, token)
                at = bisect_left(self._keys, key)
                if at == len(self._keys) or self._keys[at] != key:  # nor is anything longer there
                    break
                found = at
            if found is None or self._chances[self.sorts[found]] < least:
                break
            places.append(found)
            text.append(self.tokens[found])
        return places

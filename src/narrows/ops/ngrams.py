"""How texts may go on, by their last few tokens; see ``ngrams.c``."""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.ops.native import library

ONCE, ALIKE, APART = range(3)
"""What is known of how a text went on behind a run of tokens: it was there once, or went on alike
the last two times, or not."""


class Repeat(NamedTuple):
    """How many of a text's last tokens stood together in it before, 0 if too few; the place
    ``behind`` them; and how each token from there ``went`` on from those before it."""

    size: int
    behind: int
    went: array[int]


def repeats(
    texts: Sequence[array[int]], shortest: int, longest: int, far: int, most: int
) -> list[Repeat]:
    """What the last tokens of each of ``texts`` (of type code i) repeat: the longest match counts,
    of ``shortest`` to ``longest`` tokens, of several the last; how far that one goes on is told up
    to ``far``. Of each of ``most`` tokens behind it, as far as there are some, how it followed
    those before it as far as they match by then, at most ``longest``: ONCE, ALIKE or APART."""
    native = library()
    if native is None:
        return [repeats_plain(text, shortest, longest, far, most) for text in texts]
    held, width = array("q"), 2 + most
    for text in texts:
        held.extend(text.buffer_info())
    found = array("q", bytes(8 * width * len(texts)))
    native.repeats(
        *(held.buffer_info()[0], len(texts), shortest, longest, far, most),
        found.buffer_info()[0],
    )
    none = Repeat(0, 0, array("q"))
    told = [none] * len(texts)
    for i, (text, at) in enumerate(zip(texts, range(0, len(found), width), strict=True)):
        if size := found[at]:
            behind = found[at + 1]
            known = min(most, len(text) - behind)
            told[i] = Repeat(size, behind, found[at + 2 : at + 2 + known])
    return told


def repeats_plain(text: array[int], shortest: int, longest: int, far: int, most: int) -> Repeat:
    """The definition of ``repeats``, of one text."""
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
        return Repeat(0, 0, went)
    for i in range(min(most, count - behind)):
        before = earlier(behind + i, min(size + i, longest))
        alike = before >= 0 and text[before] == text[behind + i]
        went.append(ONCE if before < 0 else ALIKE if alike else APART)
    if size == longest:  # else no more can match, or a longer one had been found
        while size < min(far, behind) and text[behind - size - 1] == text[count - size - 1]:
            size += 1
    return Repeat(size, behind, went)


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

    def behind(
        self, texts: Sequence[Sequence[int]], longest: int, most: int, least: float
    ) -> list[array[int]]:
        """Where guesses stand that go on from each of ``texts``, at most ``most``: each what
        follows the longest run known, of up to ``longest`` tokens, that ends there, as long as one
        is and its chance is at least ``least``."""
        native = library()
        if native is None:
            return [self.behind_plain(text, longest, most, least) for text in texts]
        last = array("i")
        for text in texts:
            end = text[-longest:]
            last.extend([-1] * (longest - len(end)))
            last.extend(end)
        width = 1 + most
        found = array("q", bytes(8 * width * len(texts)))
        native.phrases(
            *(self._address, last.buffer_info()[0], len(texts), longest, most, least),
            found.buffer_info()[0],
        )
        return [found[at + 1 : at + 1 + found[at]] for at in range(0, len(found), width)]

    def behind_plain(
        self, text: Sequence[int], longest: int, most: int, least: float
    ) -> array[int]:
        """The definition of ``behind``, of one text."""
        text, places = list(text), array("q")
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

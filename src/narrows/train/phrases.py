"""Counts phrases in a model's own answers (``draft/phrases.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.draft.phrases import LONGEST, Phrases
from narrows.errors import InputError
from narrows.ops.ngrams import MASK, MIX
from narrows.train.examples import Example

OFTEN = 3
"""Times a run has been seen before what followed it counts."""
TIMES = torch.tensor([OFTEN, 5, 9, 17, 33])
"""Runs seen at least so often, and less often than the next, are told apart,"""
SHARES = 5
"""and so are parts of the way from 0 to 1 of how much of what followed them was the likeliest."""
HELD_OUT = 0.1
"""Share of the examples, at the end, from which chances are learnt; then they are counted, too."""


class Found(NamedTuple):
    """``found`` of ``places`` in answers held out had a run that was known, and a guess was right
    at ``right`` of them."""

    places: int
    found: int
    right: int


class _Counts(NamedTuple):
    """Of each run: its key, rising, the likeliest token behind it, and the guess's sort."""

    keys: Tensor
    tokens: Tensor
    sorts: Tensor


def count_phrases(examples: Sequence[Example], fingerprint: str) -> tuple[Phrases, Found]:
    """Phrases of the model with ``fingerprint``, which gave the answers in ``examples``; and how
    good those counted in the first are at the last of them. Raises InputError if there are too few
    answers to tell."""
    held = max(1, round(HELD_OUT * len(examples)))
    if len(examples) <= held:
        raise InputError(f"{len(examples)} answered prompts are too few to count; give more")
    lengths = range(1, LONGEST + 1)
    known, (runs, followers) = _followers(examples[:-held]), _followers(examples[-held:])
    sort_count = LONGEST * len(TIMES) * SHARES
    longest_at = torch.full((len(followers),), -1)
    guesses = torch.full((len(followers),), -1)
    for length in lengths:
        counts = _count(length, known[0][length - 1], known[1])
        at = torch.searchsorted(counts.keys, runs[length - 1])
        there = torch.cat([counts.keys, torch.tensor([-1])])[at] == runs[length - 1]
        guesses[there] = counts.tokens[at[there]]
        longest_at[there] = counts.sorts[at[there]]
    found = longest_at >= 0
    hits = guesses[found] == followers[found]
    tried = torch.bincount(longest_at[found], minlength=sort_count)
    right = torch.bincount(longest_at[found], hits.double(), minlength=sort_count)
    keys, followers = _followers(examples)
    all_of = [_count(length, keys[length - 1], followers) for length in lengths]
    joined = _Counts(*(torch.cat(parts) for parts in zip(*all_of, strict=True)))
    order = joined.keys.argsort()
    phrases = Phrases(
        fingerprint,
        joined.keys[order],
        joined.tokens[order].int(),
        joined.sorts[order].to(torch.uint8),
        ((right + 1) / (tried + 2)).float(),
    )
    return phrases, Found(len(found), int(found.sum()), int(hits.sum()))


def _followers(examples: Sequence[Example]) -> tuple[list[Tensor], Tensor]:
    """For each token of an answer, of those that LONGEST tokens stand before: the keys of the runs
    of one to LONGEST before it, as ``longer_key`` makes them, int64 ``[n]`` each; and the token."""
    keys: list[list[Tensor]] = [[] for _ in range(LONGEST)]
    tokens = []
    for example in examples:
        ids, key = torch.tensor(example.tokens), torch.tensor(0)
        start = max(example.start, LONGEST)
        for i, some in enumerate(keys, 1):
            key = (key * MIX + ids[start - i : len(ids) - i] + 1) & MASK
            some.append(key)
        tokens.append(ids[start:])
    return [torch.cat(some) for some in keys], torch.cat(tokens)


def _count(length: int, keys: Tensor, followers: Tensor) -> _Counts:
    """Of runs of ``length`` seen OFTEN, what followed each most often: the lowest of several."""
    order = followers.argsort(stable=True)
    order = order[keys[order].argsort(stable=True)]
    pairs = torch.stack([keys[order], followers[order]])
    pairs, times = torch.unique_consecutive(pairs, dim=1, return_counts=True)
    runs, kinds = torch.unique_consecutive(pairs[0], return_counts=True)
    run = torch.repeat_interleave(torch.arange(len(runs)), kinds)
    seen = torch.zeros(len(runs), dtype=torch.int64).index_add_(0, run, times)
    order = (-times).argsort(stable=True)
    order = order[run[order].argsort(stable=True)]
    best = order[kinds.cumsum(0) - kinds]
    often = seen >= OFTEN
    runs, best, seen = runs[often], best[often], seen[often]
    part = torch.bucketize(seen, TIMES, right=True) - 1
    share = (times[best] * SHARES // seen).clamp(max=SHARES - 1)
    sorts = ((length - 1) * len(TIMES) + part) * SHARES + share
    return _Counts(runs, pairs[1][best], sorts)

"""Codebooks: what they give back, and rotation by differences against the model's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.cache import codebook
from narrows.cache.codebook import Codebook, Rule
from narrows.ops.cover import likeness_graph, nearest
from narrows.ops.rotary import turn
from oracles.codebook_reference import entries_of
from tiny import pair

ROPES = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
             "original_max_position_embeddings": 128},
}  # fmt: skip


def rotary(name: str):
    changes = {} if ROPES[name] is None else {"rope_parameters": ROPES[name]}
    return pair("llama", **{k: Frozen(v) for k, v in changes.items()})[0].rotary


class Frozen(dict):
    """A dictionary that a cache of models can have for a key."""

    def __hash__(self) -> int:
        return hash(str(self))


def alike(n: int, spread: float, seed: int = 0, dim: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, dim, generator=g)
    which = torch.randint(0, 5, (n,), generator=g)
    length = torch.rand(n, 1, generator=g) + 0.5
    return (centres[which] + spread * torch.randn(n, dim, generator=g)) * length


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.floats(0.05, 1.0), st.floats(0.6, 0.99), st.integers(1, 100))
def test_values_come_back_within_the_bound(n, spread, theta, block):
    x = alike(n, spread)
    book = Codebook(Rule(theta, block), None)
    book.extend(x, torch.arange(n))
    error = (book.rebuild() - x).norm(dim=1)
    assert (error <= math.sqrt(2 * (1 - theta)) * x.norm(dim=1) * 1.001 + 1e-5).all()
    weights = torch.rand(3, 2, n)
    torch.testing.assert_close(book.mix(weights), weights @ book.rebuild(), rtol=1e-4, atol=1e-4)
    own = (book.ratio == 1) & (x == book.entries[book.index.long()]).all(1)
    assert int(own.sum()) >= len(book.entries)  # entries are given back to the bit
    assert torch.equal(book.rebuild()[own], x[own])


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_alike_before_rotation_and_come_back_rotated(name, dtype):
    own = rotary(name)
    n = 60
    plain = alike(n, 0.01)
    places = torch.arange(n) * 2 + 3
    keys = turn(plain[:, None], *own(places))[:, 0].to(dtype)
    book = Codebook(Rule(0.98, 1000), own)
    book.extend(keys, places)
    assert len(book.entries) == 5  # as many as there are directions
    assert book.turns.dtype == torch.int16
    back = book.rebuild()
    entry = torch.zeros(n, dtype=torch.bool)
    entry[[int((book.index == i).nonzero()[0]) for i in range(5)]] = True
    first = (book.turns == 0) & (book.ratio == 1)
    assert int(first.sum()) >= 5
    assert torch.equal(back[first], keys[first])  # to the bit, whatever the model's scaling
    error = (back.float() - keys.float()).norm(dim=1) / keys.float().norm(dim=1)
    assert float(error.max()) < 0.2
    # The model's own rotation of the entry's vector, at each token's own place.
    entries = torch.stack([plain[places == p][0] for p in book.origin.tolist()])
    wanted = entries[book.index.long()] * book.ratio.float()[:, None]
    wanted = turn(wanted[:, None], *own(places))[:, 0]
    torch.testing.assert_close(
        back.float(), wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max())
    )


def test_a_wrong_place_gives_another_key():
    own = rotary("plain")
    plain, places = alike(40, 0.01), torch.arange(40)
    keys = turn(plain[:, None], *own(places))[:, 0]
    book = Codebook(Rule(0.98, 1000), own)
    book.extend(keys, places)
    right = (book.rebuild() - keys).norm(dim=1).max()
    book.turns = book.turns + (book.turns != 0).to(book.turns.dtype)
    book._codes = None
    assert (book.rebuild() - keys).norm(dim=1).max() > 5 * right


def test_later_vectors_use_what_is_there():
    x = alike(200, 0.01)
    book = Codebook(Rule(0.98, 1000), None)
    book.extend(x[:100], torch.arange(100))
    entries = len(book.entries)
    book.extend(x[100:], torch.arange(100, 200))
    assert len(book.entries) == entries == 5
    assert len(book) == 200
    book.extend(-x[:3], torch.arange(200, 203))
    assert len(book.entries) > entries
    book.cut(200, entries)
    again = Codebook(Rule(0.98, 1000), None)
    again.extend(x[:100], torch.arange(100))
    again.extend(x[100:], torch.arange(100, 200))
    assert all(torch.equal(a, b) for a, b in zip(book.tensors, again.tensors, strict=True))


def test_blocks_keep_the_bound_and_cost_entries():
    x = alike(300, 0.25)
    whole, parts = Codebook(Rule(0.9, 300), None), Codebook(Rule(0.9, 30), None)
    for book in (whole, parts):
        book.extend(x, torch.arange(300))
        error = (book.rebuild() - x).norm(dim=1) / x.norm(dim=1)
        assert float(error.max()) <= math.sqrt(0.2) + 1e-5
    assert len(parts.entries) >= len(whole.entries)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 40))
def test_a_book_is_the_slow_one_that_looks_at_its_newest_entries(seed, runs, block):
    x = alike(sum(runs), 0.5, seed)
    book, parts = Codebook(Rule(0.8, block), None), []
    for run in x.split(runs):
        book.extend(run, torch.arange(len(run)))
        parts += [min(block, len(run) - a) for a in range(0, len(run), block)]
    owner = entries_of(x, 0.8, parts, reach=block)
    assert torch.equal(book.entries[book.index.long()], x[owner])
    if len(book.entries) <= block:  # then looking at all of them was the same
        assert torch.equal(owner, entries_of(x, 0.8, parts))


def test_comparisons_grow_no_faster_than_tokens(monkeypatch):
    """Counted, of vectors of which no two are alike, so that all become entries."""
    compared = [0]

    def graph(x, threshold):
        compared[0] += len(x) ** 2
        return likeness_graph(x, threshold)

    def found(x, others):
        compared[0] += len(x) * len(others)
        return nearest(x, others)

    monkeypatch.setattr(codebook, "likeness_graph", graph)
    monkeypatch.setattr(codebook, "nearest", found)
    x = torch.randn(320, 64, generator=torch.Generator().manual_seed(0))
    counts = []
    for tokens in (80, 160, 320):
        compared[0] = 0
        book = Codebook(Rule(0.99, 40), None)
        book.extend(x[:tokens], torch.arange(tokens))
        for later in x[:tokens].flip(0).split(8):
            book.extend(-later, torch.arange(len(later)))
        assert len(book.entries) == 2 * tokens
        counts.append(compared[0])
    one = 40 * 40  # pairs of a block among themselves, or with the entries it looks at
    built, folded = 2 * one, 80 * (40 + 8)
    assert counts[0] == built + one + folded
    assert counts[1] - counts[0] == 2 * built + folded
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def test_vectors_of_no_length_and_a_threshold_of_one():
    book = Codebook(Rule(0.9, 100), None)
    book.extend(torch.zeros(4, 8), torch.arange(4))
    assert torch.equal(book.rebuild(), torch.zeros(4, 8))
    x = alike(20, 0.0)
    book = Codebook(Rule(1.0, 100), None)
    book.extend(torch.cat([x, x]), torch.arange(40))
    assert torch.equal(book.rebuild(), torch.cat([x, x]))


def test_weights_are_copies_of_a_token():
    x = alike(30, 0.4)
    weights = torch.randint(1, 4, (30,), generator=torch.Generator().manual_seed(1))
    written = torch.repeat_interleave(torch.arange(30), weights)
    ours, literal = Codebook(Rule(0.9, 500), None), Codebook(Rule(0.9, 500), None)
    ours.extend(x, torch.arange(30), weights)
    literal.extend(x[written], written)
    assert torch.equal(ours.entries, literal.entries)
    assert torch.equal(ours.index[written], literal.index)

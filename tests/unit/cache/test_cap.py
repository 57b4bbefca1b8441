"""Eviction again under a cap: which tokens stay, and the laws of caches over it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.cache import scores
from narrows.cache.dense import DenseLayer
from narrows.cache.stack import parse_cache
from narrows.contracts import LayerShape
from narrows.errors import ConfigError
from tiny import prompts
from tiny_caches import IDS, assert_bytes_are_storages, held, read, run, sealed

BY_AGE = [
    "streaming:keep=0.4,cap=32,hold=4",
    "h2o:keep=0.4,cap=32,hold=4",
    "kvzip:keep=0.4,cap=32,hold=4",
    "expected:keep=0.4,cap=32,hold=4",
]
BY_KEYS = [
    "evict:keep=0.4,window=4,score=key_norm,heads=mean,cap=32,hold=4",
    "evict:keep=0.4,window=4,score=key_difference,heads=mean,sinks=2,cap=32,hold=4",
    "evict:keep=0.4,window=4,score=random,heads=mean,cap=32,hold=4",
]
RAGGED = [
    "evict:keep=0.3,window=4,heads=per_query_head,schedule=pyramid,cap=32,hold=4",
    "evict:keep=0.3,window=4,heads=max,adaptive=true,cap=32,hold=4",
]
LOOSE = "theta_k=0.6,theta_v=0.6,window=4,tail=4,fold_every=8,pays=1,cap=32,hold=4"
CODED = [
    f"spindle:keep=0.5,{LOOSE}",
    f"spindle:preset=paper,keep=0.4,{LOOSE}",
    f"spindle:preset=codebook_only,{LOOSE}",
    f"spindle:preset=tuned,keep=0.5,block=16,{LOOSE}",
]
SPECS = [*BY_AGE, *BY_KEYS, *RAGGED, *CODED]
IDS = IDS * 3


def stores(caches) -> list[torch.Tensor]:
    """All keys and values held, books rebuilt."""
    kept = [c.store for c in caches]
    return [s.whole(side, h) for s in kept for side in (0, 1) for h in range(len(s.held))]


@torch.inference_mode()
@pytest.mark.parametrize("spec", [*BY_AGE, *BY_KEYS])
@pytest.mark.parametrize("chunks", [(1,) * 100, (50, 1, 49), (100,)])
def test_what_is_held_is_what_one_token_at_a_time_leaves(spec, chunks):
    _, caches = sealed(spec)
    layer, options = caches[0], parse_cache(spec).options
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(100, 2, 16, generator=g) for _ in range(2))
    rate, sinks = {
        "key_norm": (lambda x: -x.norm(dim=1), 0),
        "key_difference": (scores.KeyDifference(), 2),
        "random": (scores.Chance(0), 0),
    }.get(options.score, (lambda x: torch.arange(len(x)), 4))
    wanted = []
    for head in range(2):
        keys = layer.store.whole(0, head)
        for token in k[:, head]:
            if len(keys) == 32:
                rated = rate(keys) if callable(rate) else rate.rate(dense(keys))[0]
                rated = rated.float()
                rated[:sinks] = rated[len(rated) - options.window :] = torch.inf
                keys = keys[rated.argsort(descending=True, stable=True)[:28].sort().values]
            keys = torch.cat([keys, token[None]])
        wanted.append(keys)
    for new_k, new_v in zip(k.split(chunks), v.split(chunks), strict=True):
        layer.append(new_k, new_v)
    assert layer.length == 160
    assert all(torch.equal(layer.store.whole(0, h), wanted[h]) for h in range(2))


def dense(keys: torch.Tensor) -> DenseLayer:
    made = DenseLayer(LayerShape(1, 16, 16), keys.dtype, keys.device)
    made.append(keys[:, None], keys[:, None])
    return made


@torch.inference_mode()
@pytest.mark.parametrize("spec", CODED)
def test_thinned_books_and_masks_give_what_is_left_of_them(spec):
    _, caches = sealed(spec)
    for layer in caches:
        store = layer.store
        g = torch.Generator().manual_seed(2)
        kept = [(torch.rand(n, generator=g) < 0.5).nonzero()[:, 0] for n in store.held]
        thin = store.thinned(kept)
        for head, tokens in enumerate(kept):
            for side in (0, 1):
                assert torch.equal(thin.whole(side, head), store.whole(side, head)[tokens])
                book = thin.books[side][head]
                if book is not None and len(book):
                    assert book.index.unique().tolist() == list(range(len(book.entries)))
            if store.seen is not None:
                seen = store.seen[head]
                assert torch.equal(thin.seen[head], seen[tokens[tokens < len(seen)]])
        gone = store.thinned([torch.arange(n - 3, n) for n in store.held])  # no coded one
        q, new = torch.randn(2, 4, 16), torch.randn(2, 2, 16)
        gone.append(new, new)
        assert torch.isfinite(gone.attend(q, 0.3)).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunks", [(60,), (3, 9, 8, 21, 19)])
def test_tokens_at_once_are_tokens_one_by_one(spec, chunks):
    flat, one = sealed(spec, prompt=38, chunks=(38,))  # so that no token comes twice
    several = copy.deepcopy(one)
    first = torch.cat(read(flat, one, IDS, [1] * 60))
    then = torch.cat(read(flat, several, IDS, list(chunks)))
    torch.testing.assert_close(first, then, rtol=1e-3, atol=1e-4)
    assert all(c._evicted_at > 38 for c in one if max(c.store.held) > 24)
    assert any(c._evicted_at > 38 for c in one)
    for a, b in zip(one, several, strict=True):
        assert (a.length, a._evicted_at) == (b.length, b._evicted_at)
        assert a.store.held == b.store.held
        assert max(a.store.held) <= 32


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 40), st.integers(1, 4), st.integers(0, 4))
def test_what_is_rolled_back_was_never_there(spec, before, more, kept):
    kept = min(kept, more)
    flat, caches = sealed(spec)
    if before:
        read(flat, caches, IDS, [before])
    plain = copy.deepcopy(caches)
    read(flat, caches, IDS, [more])
    for cache in caches:
        cache.rollback(more - kept)
    if kept:
        read(flat, plain, IDS, [kept])
    ours, theirs = (read(flat, c, IDS, [1] * 3) for c in (caches, plain))
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=1e-3, atol=1e-4)
    for a, b in zip(caches, plain, strict=True):
        assert (a.length, a._evicted_at, a.store.held) == (b.length, b._evicted_at, b.store.held)
    for a, b in zip(stores(caches), stores(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_eviction_is_rolled_back_with_hold_only():
    flat, caches = sealed("streaming:keep=0.4,cap=32")
    read(flat, caches, IDS, [9])
    assert caches[0]._evicted_at == 68
    assert caches[0].before is None
    with pytest.raises(ValueError, match="give the cache hold=2"):
        caches[0].rollback(2)
    caches[0].rollback(1)
    flat, caches = sealed("streaming:keep=0.5,cap=40,hold=4")
    read(flat, caches, IDS, [11])
    assert caches[0].before is not None
    read(flat, caches, IDS, [3, 1])
    assert caches[0].before is None  # no rollback can ask for it any more


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_distinct_storages_and_bounded_for_ever(spec):
    flat, caches = sealed(spec)
    assert_bytes_are_storages(spec, flat, caches)
    policy = parse_cache(spec)
    bound = policy.estimate(flat.shape, 10**6, 60)
    assert bound == policy.estimate(flat.shape, 10**7, 60)
    for _ in range(40):
        read(flat, caches, IDS, [3])
        assert sum(c.nbytes for c in caches) <= bound
    assert any(c.before is not None for c in caches) or caches[0]._evicted_at


@pytest.mark.parametrize("spec", SPECS)
def test_alone_in_a_batch_and_drafted_give_the_same_tokens(spec):
    spec = spec.replace("cap=32,hold=4", "cap=64")
    spec = spec.replace("tail=4,fold_every=8", "tail=16,fold_every=16")
    batch = prompts(3, seed=11, longest=100)
    alone = [run(spec, [p])[0][0] for p in batch]
    assert run(spec, batch, prefill_chunk=17)[0] == alone
    looked, requests = run(spec, [p * 3 for p in batch], drafter="lookup", draft_tokens=4)
    assert looked == run(spec, [p * 3 for p in batch])[0]
    assert sum(r.metrics.drafted_tokens for r in requests) > 0


def test_a_prompt_beyond_the_cap_is_thinned_to_it_by_its_own_scorer():
    _, caches = sealed("h2o:keep=1.0,cap=32")
    _, wanted = sealed(f"h2o:keep={32 / 60}")
    assert all(c.store.held == [32, 32] for c in caches)
    for ours, theirs in zip(held(caches)[0], held(wanted)[0], strict=True):
        assert torch.equal(ours, theirs)
    assert parse_cache("kvzip:keep=1.0,cap=32").rehearses


def test_a_fold_and_an_eviction_behind_one_draft_are_both_undone():
    flat, caches = sealed(CODED[2].replace("cap=32", "cap=40"))
    layer = caches[1]
    assert layer.coding
    crossed = set()
    for _ in range(40):
        state, before = copy.deepcopy(layer), stores(caches)
        read(flat, caches, IDS, [4])
        folded, evicted = (at - state.length for at in (layer.folded_at, layer._evicted_at))
        if folded >= 0 and evicted >= 0:
            crossed.add((folded > evicted) - (folded < evicted))
        for cache in caches:
            cache.rollback(4)
        if min(folded, evicted) != 0 and max(folded, evicted) != 0:  # else not to be undone
            assert (layer.coded_until, layer.folded_at) == (state.coded_until, state.folded_at)
            assert layer._evicted_at == state._evicted_at
            now = stores(caches[1:2])
            assert all(torch.equal(a, b) for a, b in zip(now, before[4:8], strict=True))
        read(flat, caches, IDS, [1])
    assert crossed == {-1, 0, 1}  # in either order, and both at once


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("streaming:cap=3", "cap must leave room for the 5 first and newest tokens, which always "
         "stay, when an eighth of it is freed: at least 6"),
        ("spindle:cap=64", "room for the 132 first and newest"),
        ("h2o:cap=64,hold=9", "hold must not exceed an eighth of cap"),
        ("snapkv:cap=200+kivi", "cap drops single tokens, but codes lie in groups"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_when_parsed(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_cache(spec)


def test_drafts_longer_than_what_is_freed_at_once_are_refused():
    assert parse_cache("h2o:cap=64").holding(8).options.hold == 8
    with pytest.raises(ConfigError, match="eighth of cap is as many; use cap=72 or more"):
        parse_cache("h2o:cap=64").holding(9)

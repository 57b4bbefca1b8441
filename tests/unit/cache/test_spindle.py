"""SpindleKV: eviction and codebook together."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.cache.dense import DensePolicy
from narrows.cache.evict_layer import EvictLayer
from narrows.cache.spindle import SpindleLayer, SpindlePolicy
from narrows.cache.stack import parse_cache
from narrows.contracts import LayerShape, ModelShape
from narrows.errors import ConfigError
from tiny import pair, prompts
from tiny_caches import IDS, assert_bytes_are_storages, held, read, run, sealed

SMALL = "window=4,tail=4,fold_every=8,pays=1"
LOOSE = f"theta_k=0.6,theta_v=0.6,{SMALL}"
"""Thresholds at which even random weights' keys and values are alike."""
SPECS = [
    f"spindle:keep=0.5,{LOOSE}",
    f"spindle:preset=paper,keep=0.4,{LOOSE}",
    f"spindle:preset=codebook_only,{LOOSE}",
    f"spindle:keep=0.6,{LOOSE},cover=setcover,block=16",
]


def books(caches) -> list:
    return [b for c in caches for side in c.store.books for b in side if b is not None]


@pytest.mark.parametrize("spec", SPECS)
def test_it_codes_and_holds_less_than_eviction_alone(spec):
    _, caches = sealed(spec)
    assert books(caches)
    plain = spec.replace("theta_k=0.6,theta_v=0.6", "theta_k=1,theta_v=1")
    _, evicted = sealed(plain)
    assert not books(evicted)
    for ours, theirs in zip(caches, evicted, strict=True):
        assert ours.store.held == theirs.store.held
    size = sum(b.tensors[0].shape[0] for b in books(caches))
    assert size < sum(len(b) for b in books(caches))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_keeping_everything_and_coding_nothing_changes_not_a_bit(family, dtype):
    flat, _ = pair(family, dtype)
    outs = []
    for spec in ("dense", f"spindle:keep=1,theta_k=1,theta_v=1,{SMALL}"):
        caches = parse_cache(spec).build(flat.shape)
        first = read(flat, caches, IDS, [50])
        for cache in caches:
            cache.seal()
        outs.append(first + read(flat, caches, IDS, [1, 1, 3, 20]))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_evicting_alone_is_the_evicting_cache():
    spec = f"spindle:preset=evict_only,keep=0.4,{SMALL}"
    ours = held(sealed(spec)[1])
    theirs = held(sealed("evict:keep=0.4,window=4,heads=max,schedule=pyramid")[1])
    assert all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True)
               for a, b in zip(x, y, strict=True))  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_attention_reads_what_the_books_rebuild(spec):
    """Against dense attention over the rebuilt keys and values, masks included."""
    _, caches = sealed(spec)
    for cache in caches:
        store = cache.store
        q = torch.randn(3, 4, 16)
        k = torch.randn(3, 2, 16)
        plain = copy.deepcopy(store)
        for head in range(2):
            whole = [plain.whole(side, head).clone() for side in (0, 1)]
            plain.books[0][head] = plain.books[1][head] = None
            for side in (0, 1):
                plain.put(side, head, whole[side])
        for s in (store, plain):
            s.append(k, k)
        torch.testing.assert_close(store.attend(q, 0.3), plain.attend(q, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunks", [(20,), (3, 9, 8), (13, 7)])
def test_tokens_at_once_are_tokens_one_by_one(spec, chunks):
    flat, one = sealed(spec)
    several = copy.deepcopy(one)
    first = torch.cat(read(flat, one, IDS, [1] * 20))
    then = torch.cat(read(flat, several, IDS, list(chunks)))
    torch.testing.assert_close(first, then, rtol=1e-3, atol=1e-4)
    assert any(isinstance(c, SpindleLayer) and c.folded_at for c in one)
    for a, b in zip(one, several, strict=True):
        assert a.length == b.length == 80
        assert a.coded_until == b.coded_until


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 8), st.integers(1, 6), st.integers(0, 6))
def test_what_is_rolled_back_was_never_there(spec, before, more, kept):
    kept = min(kept, more)
    flat, caches = sealed(spec.replace("tail=4", "tail=8,hold=8"))
    if before:
        read(flat, caches, IDS, [before])
    plain = copy.deepcopy(caches)
    read(flat, caches, IDS, [more])
    for cache in caches:
        cache.rollback(more - kept)
    if kept:
        read(flat, plain, IDS, [kept])
    ours, theirs = (read(flat, c, IDS, [1] * 6) for c in (caches, plain))
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=1e-3, atol=1e-4)
    for a, b in zip(caches, plain, strict=True):
        assert (a.length, a.coded_until, a.folded_at) == (b.length, b.coded_until, b.folded_at)
        for x, y in zip(books([a]), books([b]), strict=True):
            assert all(torch.equal(s, t) for s, t in zip(x.tensors, y.tensors, strict=True))


def test_a_coded_block_cannot_be_rolled_back_without_hold():
    flat, caches = sealed(SPECS[2])
    read(flat, caches, IDS, [9])
    assert caches[0].folded_at == 68
    lengths = [c.length for c in caches]
    with pytest.raises(ValueError, match="give the cache hold=2"):
        caches[0].rollback(2)
    assert [c.length for c in caches] == lengths
    caches[0].rollback(1)


@pytest.mark.parametrize("spec", SPECS)
def test_alone_in_a_batch_and_drafted_give_the_same_tokens(spec):
    batch = prompts(4, seed=11, longest=120)
    alone = [run(spec, [p])[0][0] for p in batch]
    assert run(spec, batch, prefill_chunk=17)[0] == alone
    drafted = spec.replace("tail=4,fold_every=8", "tail=16,fold_every=16")
    looked, requests = run(drafted, [p * 3 for p in batch], drafter="lookup", draft_tokens=4)
    assert looked == run(drafted, [p * 3 for p in batch])[0]
    assert sum(r.metrics.drafted_tokens for r in requests) > 0


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_distinct_storages_and_within_the_estimate(spec):
    assert_bytes_are_storages(spec, *sealed(spec))


def test_a_side_that_would_not_shrink_stays_dense():
    _, caches = sealed(f"spindle:preset=codebook_only,{SMALL},theta_k=0.999,theta_v=0.999")
    _, dense = sealed("evict:keep=1.0,window=4")
    assert not books(caches)
    assert sum(c.nbytes for c in caches) <= sum(c.nbytes for c in dense)


@pytest.mark.parametrize("spec", [*SPECS, "spindle", "spindle:preset=paper"])
def test_spec_round_trip(spec):
    policy = parse_cache(spec)
    assert isinstance(policy, SpindlePolicy)
    assert parse_cache(policy.spec) == policy
    held = parse_cache(policy.spec).holding(3)
    assert held.options.hold == 3
    assert parse_cache(held.spec) == held


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spindle:preset=none", "preset: 'none' is not one of"),
        ("spindle:theta_k=1.5", "theta_k: "),
        ("spindle:theta_v=nan", "theta_v: "),
        ("spindle:block=0", "block: "),
        ("spindle:pays=0", "pays: "),
        ("spindle:hold=100", "hold must not exceed"),
        ("spindle:keep=0", "keep: "),
        ("spindle:colour=red", "colour"),
    ],
)
def test_bad_options_are_refused_when_parsed(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_cache(spec)


def test_it_needs_a_loaded_model_and_full_attention():
    made = ModelShape("llama", (LayerShape(1, 8, 8),), 1, 8, 10, 64, torch.float32,
                      torch.device("cpu"))  # fmt: skip
    with pytest.raises(ConfigError, match="rotary tables"):
        parse_cache("spindle").build(made)
    with pytest.raises(ConfigError, match="sliding-window layers only"):
        parse_cache("spindle").build(pair("mistral")[0].shape)
    kinds = [type(c) for c in parse_cache("spindle").build(pair("gemma3_text")[0].shape)]
    assert kinds.count(SpindleLayer) == 1
    assert EvictLayer not in kinds
    assert DensePolicy().spec == "dense"


@pytest.mark.parametrize("spec", [*SPECS, f"{SPECS[0]},target_bytes=30000"])
def test_the_dense_prompt_is_freed(spec):
    flat, _ = pair("llama")
    caches = parse_cache(spec).build(flat.shape)
    read(flat, caches, IDS, [60])
    gone = [weakref.ref(x) for c in caches for x in (c.prompt, c.prompt.k, c.prompt.v)]
    for cache in caches:
        cache.seal()
    gc.collect()
    assert all(x() is None for x in gone)


@pytest.mark.parametrize("first", [20, 41, 60])
def test_prefill_may_end_anywhere_when_all_is_kept_and_nothing_coded(first):
    flat, _ = pair("llama")
    whole = read(flat, parse_cache("dense").build(flat.shape), IDS, [80])[0]
    caches = parse_cache(f"spindle:keep=1,theta_k=1,theta_v=1,{SMALL}").build(flat.shape)
    outs = read(flat, caches, IDS, [first])
    for cache in caches:
        cache.seal()
    outs += read(flat, caches, IDS, [1] * (80 - first))
    torch.testing.assert_close(torch.cat(outs), whole, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_appending_alone_folds_as_steps_do():
    _, caches = sealed(SPECS[2])
    one, several = copy.deepcopy(caches[0]), copy.deepcopy(caches[0])
    k, v = torch.randn(30, 2, 16), torch.randn(30, 2, 16)
    for i in range(30):
        one.append(k[i : i + 1], v[i : i + 1])
    several.append(k, v)
    assert one.length == several.length == 90
    assert one.coded_until == several.coded_until > 60
    for a, b in zip(one.materialize(), several.materialize(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("spec", "prompt", "tokens"),
    [
        ("spindle:preset=codebook_only,tail=8,fold_every=4", 60, 61),
        (
            "spindle:score=random,preset=rehearsed,theta_v=0.6,pays=1.0,block=16,tail=4,fold_every=0",
            60,
            65,
        ),
        ("spindle:score=key_difference,preset=tuned,tail=4,fold_every=8", 33, 43),
        ("spindle:preset=asked,window=9,tail=4,fold_every=8", 40, 50),
    ],
)
def test_short_prompts_stay_within_the_estimate(spec, prompt, tokens):
    flat, policy = pair("llama")[0], parse_cache(spec)
    caches = policy.build(flat.shape)
    read(flat, caches, IDS * 2, [prompt])
    for cache in caches:
        cache.seal()
    read(flat, caches, IDS * 2, [1] * (tokens - prompt))
    assert sum(c.nbytes for c in caches) <= policy.estimate(flat.shape, tokens, prompt)

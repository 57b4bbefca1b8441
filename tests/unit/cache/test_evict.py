"""The evicting caches: their laws, a masked reference, and what they really free."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.cache.dense import DenseLayer, DensePolicy
from narrows.cache.evict import EvictPolicy
from narrows.cache.evict_layer import EvictLayer
from narrows.cache.heads import room
from narrows.cache.hf import hf_cache
from narrows.cache.rehearse import rehearse
from narrows.cache.stack import parse_cache
from narrows.contracts import LayerShape, ModelShape
from narrows.errors import BudgetError, ConfigError
from oracles.evict_reference import MaskedLayer
from tiny import FAMILIES, pair, prompts
from tiny_caches import IDS, assert_bytes_are_storages, held, read, run, sealed

CPU = torch.device("cpu")
SPECS = [
    "streaming:keep=0.4",
    "h2o:keep=0.4",
    "tova:keep=0.4",
    "snapkv:keep=0.4,window=8",
    "pyramidkv:keep=0.4,window=4,beta=2",
    "expected:keep=0.4",
    "kvzip:keep=0.4",
    "evict:keep=0.4,window=4",
    "evict:keep=0.3,window=4,heads=per_query_head,schedule=pyramid",
    "evict:keep=0.4,window=4,heads=max,adaptive=true",
    "evict:keep=0.4,window=4,score=key_norm,heads=mean",
    "evict:keep=0.4,window=4,score=key_difference,heads=mean",
    "evict:keep=0.4,window=4,score=random,heads=mean,sinks=2",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_outputs_are_those_of_a_mask_that_hides_what_was_dropped(spec, family):
    flat, caches = sealed(spec, family)
    policy = parse_cache(spec)
    again = policy.build(flat.shape)
    read(flat, again, IDS, [60])
    if policy.rehearses:
        rehearse(flat, again, IDS[:60])
    masked = [
        MaskedLayer(c.choice(policy.options.keep))
        if isinstance(c, EvictLayer)
        else copy.deepcopy(c)
        for c in again
    ]
    fresh = [m if isinstance(m, MaskedLayer) else parse_cache("dense").build(flat.shape)[i]
             for i, m in enumerate(masked)]  # fmt: skip
    read(flat, fresh, IDS, [60])
    for cache in fresh:
        cache.seal()
    ours, theirs = (read(flat, c, IDS, [1, 1, 7, 11]) for c in (caches, fresh))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    whole = read(flat, DensePolicy().build(flat.shape), IDS, [60, 1, 1, 7, 11])[1:]
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, whole, strict=True))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["evict", "snapkv", "h2o", "kvzip", "streaming"])
def test_keeping_everything_changes_not_a_bit(family, dtype, name):
    flat, _ = pair(family, dtype)
    outs = []
    for spec in ("dense", f"{name}:keep=1.0"):
        caches = parse_cache(spec).build(flat.shape)
        first = read(flat, caches, IDS, [60])
        for cache in caches:
            cache.seal()
        outs.append(first + read(flat, caches, IDS, [1, 1, 3, 15]))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_prompt_within_its_window_is_kept_whole_and_a_small_share_is_the_window():
    _, caches = sealed("evict:keep=0.1,window=32", prompt=20, chunks=(20,))
    assert all(c.store.held == [20, 20] for c in caches)
    _, caches = sealed("evict:keep=0.1,window=32")
    assert all(c.store.held == [32, 32] for c in caches)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunks", [(31, 29), (1,) * 60])
def test_any_chunking_of_the_prompt_keeps_the_same_tokens(spec, chunks):
    whole, parts = held(sealed(spec)[1]), held(sealed(spec, chunks=chunks)[1])
    for a, b in zip(whole, parts, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@settings(max_examples=30)
@given(st.sampled_from(SPECS), st.integers(1, 12), st.integers(0, 8))
def test_what_is_rolled_back_was_never_there(spec, more, kept):
    kept = min(kept, more)
    flat, caches = sealed(spec)
    plain = copy.deepcopy(caches)
    read(flat, caches, IDS, [more])
    for cache in caches:
        cache.rollback(more - kept)
    read(flat, plain, IDS, [kept] if kept else [])
    assert all(a.length == b.length for a, b in zip(caches, plain, strict=True))
    ours, theirs = (read(flat, c, IDS, [4]) for c in (caches, plain))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


def test_the_prompt_cannot_be_rolled_back():
    flat, caches = sealed(SPECS[0])
    read(flat, caches, IDS, [3])
    with pytest.raises(ValueError, match="thinned out"):
        caches[0].rollback(4)
    caches[0].rollback(3)


def test_a_copy_lives_on_its_own():
    flat, caches = sealed("expected:keep=0.5")
    other = copy.deepcopy(caches)
    a = read(flat, caches, IDS, [1, 5])
    b = read(flat, other, IDS, [1, 5])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    before = copy.deepcopy(parse_cache("expected").build(flat.shape))
    assert before[0].scorer.rotary is flat.rotary  # not a copy of the model


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_alone_in_a_batch_and_drafted_give_the_same_tokens(spec, family):
    batch = prompts(5, seed=11, longest=120)
    alone = [run(spec, [p], family)[0][0] for p in batch]
    assert run(spec, batch, family, prefill_chunk=17)[0] == alone
    looked, requests = run(spec, [p * 3 for p in batch], family, "lookup", draft_tokens=4)
    assert looked == run(spec, [p * 3 for p in batch], family)[0]
    assert sum(r.metrics.drafted_tokens for r in requests) > 0


def test_a_preempted_sequence_is_thinned_where_it_was_the_first_time():
    spec, batch = "snapkv:keep=0.5,window=8", prompts(4, seed=2, longest=120)
    size = parse_cache(spec).estimate(pair("llama")[0].shape, 160)
    tight, requests = run(spec, batch, cache_bytes=size * 2)
    assert sum(r.metrics.preemptions for r in requests) >= 0
    assert tight == run(spec, batch)[0]


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_distinct_storages_and_within_the_estimate(spec):
    assert_bytes_are_storages(spec, *sealed(spec))


def test_dropped_tokens_are_freed():
    shape = LayerShape(2, 64, 64)
    made = ModelShape("llama", (shape,), 4, 128, 100, 8192, torch.float32, CPU)
    cache = parse_cache("snapkv:keep=0.25").build(made)[0]
    q, k, v = torch.randn(1024, 4, 64), torch.randn(1024, 2, 64), torch.randn(1024, 2, 64)
    cache.append(k, v)
    cache.attend(q, 0.125)
    dense = weakref.ref(cache.prompt)
    before = [weakref.ref(cache.prompt.k), weakref.ref(cache.prompt.v)]
    size = cache.nbytes
    cache.seal()
    gc.collect()
    assert dense() is None
    assert all(x() is None for x in before)
    assert cache.store.held == [256, 256]
    assert cache.nbytes == 2 * 2 * 256 * 64 * 4
    assert cache.nbytes < size / 4
    cache.append(k[:1], v[:1])
    assert cache.nbytes == 2 * 2 * room(257) * 64 * 4


def test_heads_with_budgets_of_their_own_hold_just_that():
    _, caches = sealed("evict:keep=0.3,window=4,heads=mean,adaptive=true,floor=0.0")
    sizes = [c.store.held for c in caches]
    assert any(a != b for a, b in sizes)
    assert all(a + b == 2 * 18 for a, b in sizes)
    with pytest.raises(ConfigError, match="different numbers of tokens"):
        next(c for c in caches if len(set(c.store.held)) == 2).materialize()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_a_byte_budget_is_kept_and_used(spec, share):
    native = 60 * 3 * 2 * 2 * 16 * 4
    target = int(share * native)
    _, caches = sealed(f"{spec},target_bytes={target}")
    taken = sum(c.nbytes for c in caches)
    assert taken <= target
    steps = 3 * 2 * 2 * 16 * 16 * 4  # buffers grow by 16 tokens, in every layer at once or not
    assert taken > target - steps
    assert all(c.prompt is None and c.scorer is None and not c.stack for c in caches)


def test_a_byte_budget_below_the_window_is_refused():
    policy = parse_cache("evict:target_bytes=1000")
    with pytest.raises(BudgetError, match="less than the 24,576 bytes of the first 0 and"):
        policy.estimate(pair("llama")[0].shape, 100, 100)


def test_sliding_layers_stay_dense_and_models_of_them_alone_are_refused():
    caches = parse_cache("snapkv").build(pair("gemma3_text")[0].shape)
    assert [type(c) for c in caches] == [DenseLayer, DenseLayer, EvictLayer, DenseLayer]
    with pytest.raises(ConfigError, match="sliding-window layers only"):
        parse_cache("snapkv").build(pair("mistral")[0].shape)


@pytest.mark.parametrize("spec", [*SPECS, "evict", "snapkv"])
def test_spec_round_trip(spec):
    policy = parse_cache(spec)
    assert isinstance(policy, EvictPolicy)
    assert parse_cache(policy.spec) == policy
    assert policy.holding(100) == policy


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv:keep=0", "keep: "),
        ("snapkv:keep=1.5", "keep: "),
        ("evict:keep=nan", "keep: "),
        ("evict:window=0", "window: "),
        ("evict:pool=avg,pool_kernel=4", "pool_kernel must be odd"),
        ("evict:adaptive=true", "adaptive needs heads=mean or max"),
        ("evict:schedule=pyramid,beta=2", "beta must be below 1"),
        ("pyramidkv:beta=0.5", "beta must be at least 1"),
        ("evict:score=magic", "score: "),
        ("evict:size=3", "size"),
    ],
)
def test_bad_options_are_refused_when_parsed(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_cache(spec)


def test_transformers_own_attention_is_refused():
    with pytest.raises(ConfigError, match="drops tokens"):
        hf_cache("snapkv", pair("llama")[1])


def test_expected_attention_needs_a_loaded_model():
    made = ModelShape("llama", (LayerShape(1, 8, 8),), 1, 8, 10, 64, torch.float32, CPU)
    with pytest.raises(ConfigError, match="rotary tables"):
        parse_cache("expected").build(made)


def test_a_head_that_keeps_the_window_alone_gives_numbers():
    flat, caches = sealed("evict:keep=0.01,window=2,heads=per_query_head")
    assert all(c.store.held == [2, 2] for c in caches)
    assert torch.isfinite(read(flat, caches, IDS, [1])[0]).all()


def test_drafts_see_only_policies_that_can_take_them_back():
    with pytest.raises(ConfigError, match="no more than"):
        parse_cache("snapkv").holding(1000)


def test_heads_rated_together_want_the_same():
    """A scorer of keys has no view of single query heads."""
    flat, each = sealed("evict:keep=0.4,window=4,score=key_norm,heads=per_query_head")
    _, mean = sealed("evict:keep=0.4,window=4,score=key_norm,heads=mean")
    a, b = (read(flat, c, IDS, [1, 6]) for c in (each, mean))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(st.integers(0, 20000))
def test_more_tokens_never_get_less_room(tokens):
    assert tokens <= room(tokens) <= room(tokens + 1)
    assert room(tokens) <= tokens + max(16, tokens // 8)


def test_a_byte_budget_has_kvzip_rehearse():
    assert parse_cache("kvzip:keep=1,target_bytes=99").rehearses
    assert not parse_cache("kvzip:keep=1").rehearses


def test_evicting_and_coded_is_refused_by_transformers_too():
    with pytest.raises(ConfigError, match="drops tokens"):
        hf_cache("snapkv+kivi", pair("llama")[1])

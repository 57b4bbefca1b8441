"""A codebook or codes, layer by layer: what is chosen, and the laws of caches whichever it is."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from narrows.cache.either import EitherLayer
from narrows.cache.rehearse import rehearse
from narrows.cache.saved import SavedCache, load_cache, save_cache
from narrows.cache.spindle import SpindleLayer
from narrows.cache.stack import parse_cache
from narrows.cache.thinned import ThinnedLayer
from narrows.contracts import LayerCache
from tiny import pair, prompts
from tiny_caches import IDS, read, run, storages

SMALL = "residual=16,group=16,value_group=16"
FOLDED = "window=4,tail=4,fold_every=8"
SPECS = [
    f"spindle:keep=0.5,{FOLDED}+kivi:{SMALL}",
    f"spindle:preset=tuned,{FOLDED},keep=0.7+xquant:{SMALL}",
    f"spindle:preset=rehearsed,{FOLDED}+kivi:{SMALL},bits=4",
    f"spindle:keep=1,{FOLDED},cover=setcover+kivi:{SMALL}",
]
ALIKE = [7 + i % 3 for i in range(200)]
"""Three tokens again and again: few entries stand for them in every layer."""


def model():
    return pair("llama", head_dim=32, num_hidden_layers=4)[0]


def sealed(spec: str, ids: list[int], prompt: int = 120):
    flat, policy = model(), parse_cache(spec)
    caches = policy.build(flat.shape)
    read(flat, caches, ids, [prompt])
    if policy.rehearses:
        rehearse(flat, caches, ids[:prompt])
    for cache in caches:
        cache.seal()
    return flat, caches


def kinds(caches: list[LayerCache]) -> list[type]:
    return [type(c.now) if isinstance(c, EitherLayer) else type(c) for c in caches]


def error(held: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((held - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize("spec", SPECS)
def test_the_smaller_of_two_that_err_alike_stays(spec):
    """Against the codes that the same layers hold when there is no choice."""
    plain = spec.replace("+", ",theta_k=1,theta_v=1+")
    for ids, wanted in ((ALIKE, SpindleLayer), (IDS * 2, ThinnedLayer)):
        _, ours = sealed(spec, ids)
        _, coded = sealed(plain, ids)
        _, exact = sealed(spec.split("+")[0] + ",theta_k=1,theta_v=1", ids)
        assert wanted in kinds(ours)
        for a, b, whole in zip(ours, coded, exact, strict=True):
            assert a.length == b.length == 120
            if type(a) is ThinnedLayer or type(a.now) is ThinnedLayer:
                assert a.nbytes == b.nbytes
                continue
            assert a.now.coding
            assert a.nbytes < b.nbytes
            for x, y, z in zip(a.materialize(), b.materialize(), whole.materialize(), strict=True):
                assert error(x, z) <= error(y, z)


def test_layers_that_share_codes_keep_them():
    _, caches = sealed(SPECS[1], ALIKE)
    shared = [isinstance(c, ThinnedLayer) for c in caches]
    assert shared == [False, False, True, True]
    assert SpindleLayer in kinds(caches)


def test_a_prompt_within_the_residual_has_nothing_to_compare():
    _, caches = sealed(SPECS[0], ALIKE, prompt=20)
    assert kinds(caches) == [ThinnedLayer] * 4


@torch.inference_mode()
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("ids", [ALIKE, IDS * 3])
def test_steps_and_rollback(spec, ids):
    spec = repr(parse_cache(spec).holding(4).spec)[1:-1]
    flat, caches = sealed(spec, ids)
    several = copy.deepcopy(caches)
    one = torch.cat(read(flat, caches, ids, [1] * 25))
    then = torch.cat(read(flat, several, ids, [4, 9, 12]))
    torch.testing.assert_close(one, then, rtol=1e-3, atol=1e-3)
    for more in (1, 3, 4, 2, 4, 4):
        plain = copy.deepcopy(caches)
        read(flat, caches, ids, [more])
        for cache in caches:
            cache.rollback(more)
        a, b = (read(flat, c, ids, [2])[0] for c in (caches, plain))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("ids", [ALIKE, IDS * 3])
def test_bytes_are_those_of_distinct_storages_and_within_the_estimate(spec, ids):
    flat, caches = sealed(spec, ids)
    policy = parse_cache(spec)
    for more in (0, 1, 1, 19, 40):
        if more:
            read(flat, caches, ids, [more])
        total = sum(c.nbytes for c in caches)
        assert total == storages(caches)
        assert total <= policy.estimate(flat.shape, caches[0].length, 120)


@pytest.mark.parametrize("spec", SPECS)
def test_sequences_of_both_kinds_in_a_batch_write_what_they_write_alone(spec):
    batch = [ALIKE[:110], *prompts(2, seed=3, longest=110), ALIKE[:70]]
    alone = [run(spec, [p], flat=model())[0][0] for p in batch]
    assert run(spec, batch, flat=model())[0] == alone
    spec = spec.replace("tail=4,fold_every=8", "tail=16,fold_every=16")
    drafted, requests = run(spec, batch, drafter="lookup", draft_tokens=4, flat=model())
    assert drafted == run(spec, batch, flat=model())[0]
    assert sum(r.metrics.drafted_tokens for r in requests) > 0


def test_what_was_not_chosen_is_freed():
    flat = model()
    for ids in (ALIKE, IDS * 3):
        caches = parse_cache(SPECS[0]).build(flat.shape)
        read(flat, caches, ids, [120])
        books = [c.book for c in caches]
        gone = [weakref.ref(x) for c in caches for x in (c.book.prompt, c.book.prompt.k)]
        for cache in caches:
            cache.seal()
        left = [weakref.ref(b) for b, k in zip(books, kinds(caches), strict=True)
                if k is ThinnedLayer]  # fmt: skip
        del books
        gc.collect()
        assert all(x() is None for x in gone + left)


@pytest.mark.parametrize("ids", [ALIKE, IDS * 3])
def test_a_file_goes_on_as_the_cache_in_memory_did(ids, tmp_path):
    flat, caches = sealed(SPECS[0], ids)
    saved = SavedCache(tuple(ids[:120]), caches, SPECS[0], "tiny", "torch.float32")
    save_cache(saved, tmp_path / "a.cache")
    loaded = load_cache(tmp_path / "a.cache", flat.rotary, torch.device("cpu")).caches
    assert kinds(loaded) == kinds(caches)
    a, b = (torch.cat(read(flat, c, ids, [1, 20, 3])) for c in (caches, loaded))
    assert torch.equal(a, b)


def test_spec_round_trip():
    for spec in SPECS:
        policy = parse_cache(spec)
        assert policy.chooses
        assert parse_cache(policy.spec) == policy
        held = policy.holding(4)
        assert held.evict.options.hold == held.quant.options.hold == 4
    assert not parse_cache("spindle:preset=evict_only+kivi").chooses
    assert not parse_cache("h2o+kivi").chooses

"""Eviction and codes together."""

from __future__ import annotations

import copy

import pytest
import torch

from narrows.cache.rehearse import rehearse
from narrows.cache.stack import parse_cache
from narrows.cache.thinned import ThinnedLayer, ThinnedPolicy
from narrows.errors import ConfigError
from tiny import pair, prompts
from tiny_caches import IDS, assert_bytes_are_storages, read, run

SMALL = "residual=16,group=16,value_group=16"
SPECS = [
    f"spindle:keep=0.5,window=4,theta_k=1,theta_v=1+xquant:{SMALL}",
    f"snapkv:keep=0.5,window=8+kivi:{SMALL},bits=4",
    f"h2o:keep=0.6+xquant:{SMALL},fold=block,key_meta=int8,value_meta=int8",
    f"kvzip:keep=0.6+asymkv:{SMALL}",
]


def model():
    return pair("llama", head_dim=32, num_hidden_layers=4)[0]


def sealed(spec: str, prompt: int = 60):
    flat, policy = model(), parse_cache(spec)
    caches = policy.build(flat.shape)
    read(flat, caches, IDS, [prompt])
    if policy.rehearses:
        rehearse(flat, caches, IDS[:prompt])
    CHOSEN.clear()
    for cache in caches:
        lender = next((o for o in cache.owners if o is not None), None)
        tokens = cache.prompt.choice(cache.prompt.options.keep).tokens
        CHOSEN.append(CHOSEN[caches.index(lender)] if lender else tokens)
        cache.seal()
    return flat, caches


CHOSEN: list[list[torch.Tensor]] = []
"""What each layer of the newest ``sealed`` should keep."""


@pytest.mark.parametrize("spec", SPECS)
def test_what_stays_is_coded_once_from_dense(spec):
    """The same as sealing a quantised layer that was given only the kept tokens."""
    flat, caches = sealed(spec)
    policy = parse_cache(spec)
    assert isinstance(policy, ThinnedPolicy)
    whole = parse_cache("dense").build(flat.shape)
    read(flat, whole, IDS, [60])
    plain = policy.quant.build(flat.shape)
    for number, (thin, dense, quant) in enumerate(zip(caches, whole, plain, strict=True)):
        assert isinstance(thin, ThinnedLayer)
        tokens = torch.stack(CHOSEN[number])[..., None]
        k, v = (x[:, :60].take_along_dim(tokens, 1).transpose(0, 1) for x in (dense.k, dense.v))
        quant.append(k, v)
        quant.seal()
        assert thin.length == 60
        assert quant.length == len(k) < 60
        for a, b in zip(thin.materialize(), quant.materialize(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=str(number))
        assert thin.nbytes == quant.nbytes


def test_layers_that_share_codes_keep_the_same_tokens():
    _, caches = sealed(SPECS[0] + ",value_share_from=0")
    lenders = [c.owners[1] for c in caches if c.owners[1] is not None]
    assert lenders
    assert all(owner.lends for owner in lenders)
    assert all(c.chosen is None for c in caches)  # needed no more, so no longer held


@torch.inference_mode()
@pytest.mark.parametrize("spec", SPECS)
def test_steps_and_rollback(spec):
    flat, caches = sealed(spec.replace(SMALL, SMALL + ",hold=8"))
    several = copy.deepcopy(caches)
    one = torch.cat(read(flat, caches, IDS, [1] * 15))
    then = torch.cat(read(flat, several, IDS, [4, 9, 2]))
    torch.testing.assert_close(one, then, rtol=1e-3, atol=1e-3)
    plain = copy.deepcopy(caches)
    read(flat, caches, IDS + IDS, [5])
    for cache in caches:
        cache.rollback(5)
    a, b = (read(flat, c, IDS + IDS, [3])[0] for c in (caches, plain))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_within_the_estimate(spec):
    assert_bytes_are_storages(spec, *sealed(spec))


@pytest.mark.parametrize("spec", SPECS)
def test_alone_and_in_a_batch_give_the_same_tokens(spec):
    batch = prompts(4, seed=3, longest=110)
    alone = [run(spec, [p], flat=model())[0][0] for p in batch]
    assert run(spec, batch, flat=model())[0] == alone


@pytest.mark.parametrize("spec", SPECS)
def test_spec_round_trip(spec):
    policy = parse_cache(spec)
    assert parse_cache(policy.spec) == policy
    assert parse_cache(policy.holding(4).spec).quant.options.hold == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("xquant+snapkv", "eviction comes first"),
        ("dense+xquant", "only an evicting policy"),
        ("snapkv+h2o", "only an evicting policy"),
        ("snapkv+kivi+kivi", "no more than two"),
        ("spindle:preset=paper+xquant", "per_query_head leaves KV heads"),
        ("evict:heads=max,adaptive=true+kivi", "adaptive leaves KV heads"),
        ("evict:target_bytes=99+kivi", "counted in uncoded bytes"),
        ("spindle:theta_k=0.9+kivi", "follow from the error of the codes"),
        ("snapkv+zip", "unknown cache policy 'zip'"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_cache(spec)


def test_pairs_of_layers_are_no_combination():
    assert parse_cache("xquant:key_pairs=1+3").options.key_pairs == "1+3"


@torch.inference_mode()
def test_a_thinned_prompt_is_not_given_back():
    flat, caches = sealed(SPECS[1].replace(SMALL, SMALL + ",hold=8"))
    read(flat, caches, IDS, [3])
    with pytest.raises(ValueError, match="was thinned"):
        caches[0].rollback(4)
    caches[0].rollback(3)
    assert caches[0].length == 60

"""Caches, the engine and drafters with keys and values of different sizes."""

from __future__ import annotations

import pytest
import torch

from narrows.cache.rehearse import rehearse
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.draft.specformer import SpecFormer, SpecFormerConfig
from narrows.draft.specformer_drafter import SpecFormerDrafter
from narrows.draft.specs import make_drafter
from narrows.engine.engine import Engine
from narrows.errors import ConfigError
from narrows.model.flat import FlatModel
from tiny import prompts
from tiny_caches import assert_bytes_are_storages
from tiny_latent import FAMILIES, base, converted, flat

IDS = prompts(1, longest=200, seed=9)[0] * 3
SMALL = "residual=16,group=16,value_group=16"
SPECS = [
    "dense",
    f"kivi:{SMALL}",
    f"xquant:{SMALL}",
    "h2o:keep=0.5",
    "snapkv:keep=0.5,window=8",
    "kvzip:keep=0.6",
    "spindle:keep=0.5,window=4",
    f"spindle:keep=0.5,window=4+xquant:{SMALL}",
]


def sealed(model: FlatModel, spec: str) -> list:
    policy = parse_cache(spec)
    caches = policy.build(model.shape)
    model.read(IDS[:60], caches)
    if policy.rehearses:
        rehearse(model, caches, IDS[:60])
    for cache in caches:
        cache.seal()
    return caches


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("qk", "vo"), [(16, 32), (32, 16)])
def test_attention_is_that_over_what_is_held(spec: str, qk: int, vo: int) -> None:
    model = flat(converted("llama", qk, vo))
    with torch.inference_mode():
        for cache in sealed(model, spec):
            g = torch.Generator().manual_seed(3)
            k, q = torch.randn(1, 2, qk, generator=g), torch.randn(1, 4, qk, generator=g)
            cache.append(k, torch.randn(1, 2, vo, generator=g))
            keys, values = (x.repeat_interleave(2, 1).float() for x in cache.materialize())
            weights = torch.einsum("hd,nhd->hn", q[0], keys) * 0.2
            wanted = torch.einsum("hn,nhd->hd", weights.softmax(-1), values)
            torch.testing.assert_close(cache.attend(q, 0.2)[0], wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_the_storages(spec: str) -> None:
    model = flat(converted("llama", 16, 32))
    assert_bytes_are_storages(spec, model, sealed(model, spec))


def test_codes_that_do_not_divide_the_values_are_refused() -> None:
    model = flat(converted("llama", 32, 8))
    with pytest.raises(ConfigError, match="value head size 8"):
        parse_cache(f"kivi:{SMALL}").build(model.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_no_token(family: str) -> None:
    model = flat(converted(family, 16, 32))
    limits = EngineConfig(cache_bytes=1 << 28)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    module = SpecFormer(SpecFormerConfig.of(model, slots=3))
    texts = []
    for drafter in (None, make_drafter("lookup", model), SpecFormerDrafter(module, model)):
        machine = Engine(model, parse_cache("dense"), limits, drafter)
        requests = [machine.submit(p, params) for p in (IDS[:30], IDS[5:60])]
        for _ in machine.run():
            pass
        texts.append([r.generated for r in requests])
    assert texts[0] == texts[1] == texts[2]


def test_conversions_of_one_model_are_told_apart() -> None:
    """Saved caches and drafters of one are not those of another, even of the same sizes."""
    made = [converted("llama", 16, 16), converted("llama", 16, 16, values="stride")]
    models = [flat(base("llama")), *map(flat, made), flat(made[0])]
    prints = [model.fingerprint for model in models]
    assert len(set(prints)) == 3
    assert prints[1] == prints[3]

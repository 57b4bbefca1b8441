"""Converted models against their base; sheet section 12, oracles 1, 2, 5, 8 and 15."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from narrows.cache.dense import DensePolicy
from narrows.errors import ConfigError, UnsupportedModel
from narrows.latent.convert import (
    PRESETS,
    LatentOptions,
    check,
    convert,
    parse_preset,
)
from narrows.latent.selection import stride
from narrows.model.latent import head_dim
from tiny import config as tiny_config
from tiny import pair, prompts
from tiny_latent import FAMILIES, SUBSET, base, converted, flat, logits, statistics

IDS = prompts(1, longest=200, seed=8)[0] * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_full_sizes_are_the_base_to_the_bit(family: str, preset: str) -> None:
    made = converted(family, 32, 32, **PRESETS[preset])
    assert torch.equal(logits(made, IDS), logits(base(family), IDS))


@pytest.mark.parametrize(("qk", "vo"), [(32, 16), (16, 32), (16, 8)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_subset_is_the_base_with_the_others_struck_out(
    family: str, kv_heads: int, qk: int, vo: int
) -> None:
    """Prefill and decode, from one KV head for all to one for each."""
    stock = base(family, num_key_value_heads=kv_heads)
    made = convert(stock, LatentOptions(qk=qk, vo=vo, **SUBSET))
    made.set_attn_implementation("eager")
    struck = copy.deepcopy(stock)
    size = head_dim(stock.config)
    keys = torch.zeros(size)
    keys[[*stride(size // 2, qk // 2), *(p + size // 2 for p in stride(size // 2, qk // 2))]] = 1
    values = torch.zeros(size)
    values[[i * size // vo for i in range(vo)]] = 1
    for layer in struck.base_model.layers:
        for name, mask in (("q_proj", keys), ("k_proj", keys), ("v_proj", values)):
            projection: nn.Linear = getattr(layer.self_attn, name)
            scale = (size / qk) ** 0.5 if name == "q_proj" else 1.0
            rows = mask.repeat(projection.out_features // size) * scale
            projection.weight.data *= rows[:, None]
            if projection.bias is not None:
                projection.bias.data *= rows
    wanted = logits(struck, IDS)
    torch.testing.assert_close(logits(made, IDS), wanted, rtol=2e-4, atol=2e-4)
    ours = flat(made)
    caches = DensePolicy().build(ours.shape)
    states = [ours.read(IDS[:-5], caches), *(ours.read([i], caches) for i in IDS[-5:])]
    torch.testing.assert_close(ours.logits(torch.cat(states)), wanted, rtol=1e-3, atol=1e-3)


def test_projections_hold_the_rows_of_the_kept_channels_head_by_head() -> None:
    """Each projection filled with its own row numbers; 24 of 32 values divide no stride."""
    stock = copy.deepcopy(base("llama"))
    for layer in stock.base_model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight.data[:] = torch.arange(len(weight))[:, None]
        weight = layer.self_attn.o_proj.weight
        weight.data[:] = torch.arange(weight.shape[1])
    own = convert(stock, LatentOptions(qk=16, vo=24, **SUBSET)).base_model.layers[1].self_attn
    pairs = list(range(0, 16, 2))
    channels = [*pairs, *(p + 16 for p in pairs)]
    assert own.q_proj.weight[:, 0].tolist() == [h * 32 + c for h in range(4) for c in channels]
    assert own.k_proj.weight[:, 0].tolist() == [h * 32 + c for h in range(2) for c in channels]
    kept = [i * 32 // 24 for i in range(24)]
    assert own.v_proj.weight[:, 0].tolist() == [h * 32 + c for h in range(2) for c in kept]
    assert own.o_proj.weight[0].tolist() == [h * 32 + c for h in range(4) for c in kept]


SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("rope", ["subset", "frequency_aware"])
def test_scaling_of_the_base_is_folded_into_the_frequencies_once(kind: str, rope: str) -> None:
    scaling = {"rope_type": kind, "rope_theta": 1e4, **SCALINGS[kind]}
    made = tiny_config("llama", head_dim=32, rope_parameters=scaling)
    stock = AutoModelForCausalLM.from_config(made)
    pairs = "stride" if rope == "subset" else "matched"
    made = convert(stock, LatentOptions(qk=16, vo=32, **{**SUBSET, "pairs": pairs, "rope": rope}))
    theirs, ours = stock.base_model.rotary_emb, made.base_model.rotary_emb
    chosen = made.config.kv_latent["pairs"]
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq[chosen], rtol=3e-7, atol=0)
    assert ours.attention_scaling == theirs.attention_scaling
    x, places = torch.zeros(1), torch.tensor([[0, 3, 400]])
    at = [*chosen, *(p + 16 for p in chosen)]
    for one, other in zip(ours(x, places), theirs(x, places), strict=True):
        torch.testing.assert_close(one, other[..., at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_what_is_fitted_is_nearer_to_the_base_than_what_is_not(family: str) -> None:
    """On text of the kind it was fitted to, and for each part of the start by itself."""
    wanted = logits(base(family), IDS).log_softmax(-1)

    def apart(qk: int, vo: int, **options: object) -> float:
        given = logits(converted(family, qk, vo, **{**SUBSET, **options}), IDS).log_softmax(-1)
        return float((wanted.exp() * (wanted - given)).sum(-1).mean())

    assert apart(16, 32, pairs="fit", gain="fit") < 0.95 * apart(16, 32)
    assert apart(32, 16, values="activations") < 0.95 * apart(32, 16)
    assert apart(16, 32) < apart(16, 32, rope="frequency_aware")


@pytest.mark.parametrize(("qk", "vo"), [(32, 32), (16, 32), (8, 24)])
def test_cache_bytes_are_those_of_the_formula(qk: int, vo: int) -> None:
    ours = flat(converted("llama", qk, vo, **SUBSET))
    caches = DensePolicy().build(ours.shape)
    ours.read(IDS[:32], caches)
    held = sum(k.nbytes + v.nbytes for k, v in (c.materialize() for c in caches))
    assert held == 32 * 3 * 2 * (qk + vo) * 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"qk": 17, "vo": 16}, "even"),
        ({"qk": 64, "vo": 16}, "qk is 64 but the heads of the model have 32"),
        ({"qk": 16, "vo": 33}, "vo is 33"),
        ({"qk": 18, "vo": 16, "rope": "frequency_aware"}, "divisible by 4"),
        ({"qk": 24, "vo": 16, "pairs": "matched", "rope": "frequency_aware"}, "half, a quarter"),
        ({"qk": 16, "vo": 16, "pairs": "matched"}, "go with rope=frequency_aware"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        convert(base("llama"), LatentOptions(**options), statistics("llama"))


def test_models_that_cannot_be_converted_are_refused() -> None:
    options = LatentOptions(qk=16, vo=16)
    with pytest.raises(UnsupportedModel, match="gpt2"):
        check(pair("gpt2")[1].config, options)
    with pytest.raises(UnsupportedModel, match="converted already"):
        check(converted("llama", 16, 16).config, options)
    config = copy.deepcopy(base("llama").config)
    config.quantization_config = {"bits": 4}
    with pytest.raises(UnsupportedModel, match="quantised"):
        check(config, options)
    config = copy.deepcopy(base("llama").config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="dynamic"):
        check(config, options)
    with pytest.raises(ConfigError, match="normed"):
        check(base("qwen3").config, options)


def test_the_base_stays_as_it_is() -> None:
    stock = base("llama")
    before = {name: w.clone() for name, w in stock.state_dict().items()}
    convert(stock, LatentOptions(qk=16, vo=16), statistics("llama"))
    assert all(torch.equal(w, before[name]) for name, w in stock.state_dict().items())


def test_presets_are_specs() -> None:
    assert parse_preset("tuned", 16, 8) == LatentOptions(qk=16, vo=8)
    changed = parse_preset("paper:rope=subset,values=svd", 16, 16)
    assert changed.model_dump() == {
        **{"qk": 16, "vo": 16, "pairs": "stride"},
        **{"rope": "subset", "values": "svd", "gain": "none"},
    }
    for spec, told in (
        ("best", "'best' is not one of tuned, paper"),
        ("paper:qk=8", "'qk' is none of"),
        ("paper:rope=none", "rope"),
        ("paper:rope", "option=value"),
    ):
        with pytest.raises(ConfigError, match=told):
            parse_preset(spec, 16, 16)
    with pytest.raises(ConfigError, match="qk"):
        parse_preset("tuned", 4, 16)

"""Scorers against what a stock model's attention maps and plain formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from narrows.cache import scores
from narrows.cache.dense import DenseLayer
from narrows.cache.evict_layer import EvictLayer
from narrows.cache.rehearse import rehearse
from narrows.cache.stack import parse_cache
from narrows.contracts import FlatBatch, LayerShape
from narrows.ops.native import library
from narrows.ops.rotary import turn, turn_back
from tiny import pair

CPU = torch.device("cpu")
IDS = torch.randint(3, 101, (70,), generator=torch.Generator().manual_seed(3)).tolist()


def read(spec, ids=IDS, chunks=(70,), family="llama"):
    """The caches of a tiny model that has read ``ids`` in chunks of these sizes, not sealed."""
    flat, _ = pair(family)
    caches = parse_cache(spec).build(flat.shape)
    at = 0
    for n in chunks:
        places = torch.arange(at, at + n)
        flat.hidden(torch.tensor(ids[at : at + n]), places, FlatBatch([(0, n)], [caches]))
        at += n
    assert at == len(ids)
    return caches


def maps(ids=IDS, family="llama"):
    """The stock model's attention maps, ``[heads, n, n]`` a layer."""
    _, stock = pair(family)
    with torch.no_grad():
        out = stock(torch.tensor([ids]), output_attentions=True)
    return [layer[0] for layer in out.attentions]


def rated(cache):
    assert isinstance(cache, EvictLayer)
    return cache.scorer.rate(cache.prompt)


@pytest.mark.parametrize("chunks", [(70,), (50, 20), (64, 5, 1), (1,) * 70])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_window_attention_is_the_models_own(family, chunks):
    for cache, full in zip(
        read("evict:window=8", chunks=chunks, family=family), maps(family=family), strict=True
    ):
        torch.testing.assert_close(rated(cache), full[:, -8:].mean(1), rtol=1e-3, atol=2e-6)


def test_a_pooled_window_is_snapkvs():
    for cache, full in zip(
        read("snapkv:window=8,pool_kernel=5", chunks=(60, 10)), maps(), strict=True
    ):
        mean = full[:, -8:, :-8].mean(1)
        smooth = functional.avg_pool1d(mean, kernel_size=5, padding=2, stride=1)
        torch.testing.assert_close(rated(cache)[:, :-8], smooth, rtol=1e-3, atol=2e-6)
    for cache, full in zip(read("evict:window=8,pool=max,pool_kernel=3"), maps(), strict=True):
        mean = full[:, -8:, :-8].mean(1)
        most = torch.stack([mean[:, max(0, i - 1) : i + 2].amax(1) for i in range(62)], 1)
        torch.testing.assert_close(rated(cache)[:, :-8], most, rtol=1e-3, atol=2e-6)


def test_equation_two_as_printed_favours_the_newest():
    plain, printed = (
        rated(read(f"evict:window=8,score_norm={norm}")[1]) for norm in ("window", "eq2")
    )
    behind = torch.tensor([70.0 - a for a in range(62)])
    torch.testing.assert_close(printed[:, :62], plain[:, :62] * 8 / behind)


@pytest.mark.parametrize("chunks", [(70,), (33, 30, 7), (1,) * 70])
def test_accumulated_attention_sums_the_columns(chunks):
    for cache, full in zip(read("h2o", chunks=chunks), maps(), strict=True):
        torch.testing.assert_close(rated(cache), full.sum(1), rtol=1e-3, atol=2e-5)
    observed = read("h2o:score_norm=eq2", chunks=chunks)[0]
    seen_by = torch.arange(70, 0, -1)
    torch.testing.assert_close(rated(observed), maps()[0].sum(1) / seen_by, rtol=1e-3, atol=2e-6)


def test_tova_asks_the_last_query():
    for cache, full in zip(read("tova"), maps(), strict=True):
        torch.testing.assert_close(rated(cache), full[:, -1], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("chunks", [(70,), (40, 30)])
def test_expected_attention_is_its_formula(chunks):
    """From queries before rotation, as the model's own projection makes them."""
    flat, stock = pair("llama")
    inputs = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(
            lambda m, a, out, i=i: inputs.__setitem__(i, out[0])
        )
        for i, layer in enumerate(stock.model.layers)
    ]
    with torch.no_grad():
        stock(torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    cosine, sine = (t.double() for t in flat.rotary(torch.arange(70, 70 + scores.FUTURE)))
    for i, cache in enumerate(read("expected", chunks=chunks)):
        got = rated(cache)
        q = inputs[i].view(70, 4, 16)[4:].double()
        for head in range(4):
            rows = q[:, head]
            mean, spread = rows.mean(0), torch.cov(rows.T, correction=0)
            rotations = torch.stack(
                [turn(torch.eye(16).double()[:, None], c.expand(16, -1), s.expand(16, -1))[:, 0].T
                 for c, s in zip(cosine, sine, strict=True)]
            )  # fmt: skip
            rotation = rotations.mean(0)
            mean, spread = rotation @ mean, rotation @ spread @ rotation.T
            k = cache.prompt.k[head // 2, 4:70].double()
            score = k @ mean / 4 + torch.einsum("ni,ij,nj->n", k, spread, k) / 16 / 2
            value = cache.prompt.v[head // 2, 4:70].double().norm(dim=-1)
            torch.testing.assert_close(
                got[head, 4:].double(), score.softmax(0) * value, rtol=2e-3, atol=1e-6
            )


def test_rotation_back_undoes_scaled_tables():
    x = torch.randn(5, 3, 8)
    angle = torch.rand(5, 4) * 6
    cosine, sine = (1.3 * f(torch.cat([angle, angle], 1)) for f in (torch.cos, torch.sin))
    torch.testing.assert_close(turn_back(turn(x, cosine, sine), cosine, sine), x)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rehearsal_rates_by_repetition_and_leaves_nothing(family):
    flat, _ = pair(family)
    caches = read("kvzip", family=family)
    before = [[x.clone() for x in c.materialize()] for c in caches]
    rehearse(flat, caches, IDS)
    for cache, old in zip(caches, before, strict=True):
        assert cache.length == 70
        assert all(torch.equal(a, b) for a, b in zip(cache.materialize(), old, strict=True))
    full = maps([*IDS, *IDS], family)
    for cache, repeated in zip(caches, full, strict=True):
        if isinstance(cache, EvictLayer):
            torch.testing.assert_close(
                rated(cache), repeated[:, 70:, :70].amax(1), rtol=1e-3, atol=2e-6
            )


def test_rehearsal_reads_long_prompts_in_chunks_that_fit(monkeypatch):
    flat, _ = pair("llama")
    monkeypatch.setattr("narrows.cache.rehearse.CHUNK", 32)
    caches = read("kvzip")
    seen = []
    for cache in caches:

        def attend(q, dense, scale, scorer=cache.scorer):
            seen.append(scorer.rehearsal)
            return dense.attend(q, scale)

        cache.scorer.attend = attend
    rehearse(flat, caches, IDS)
    assert seen[:: len(caches)] == [(0, 32), (32, 64), (64, 70)]
    assert all(c.scorer.rehearsal is None for c in caches)


@pytest.mark.skipif(
    library() is None or not library().flash_ready(), reason="no products of bfloat16 pairs here"
)
def test_rehearsal_by_the_kernel_notes_what_it_does_without(monkeypatch):
    torch.manual_seed(1)
    dense = DenseLayer(LayerShape(2, 64, 64), torch.bfloat16, CPU)
    found, outs = [], []
    dense.append(torch.randn(400, 2, 64), torch.randn(400, 2, 64))
    q = torch.randn(90, 6, 64)
    for fast in (True, False):
        monkeypatch.setattr(scores.flash, "supported", lambda q, dtype, fast=fast: fast)
        scorer = scores.Reconstruction()
        for scorer.rehearsal in ((0, 100), (100, 290)):
            outs.append(scorer.attend(q, dense, 0.125))
        found.append(scorer.rate(dense))
    assert found[0].shape == (6, 310)
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.005)
    torch.testing.assert_close(outs[0], outs[2], rtol=0.02, atol=0.02)
    assert not found[0][:, 290:].any()


def test_rehearsal_of_a_prompt_that_fills_the_window():
    flat, _ = pair("gpt2")  # whose table of positions ends with its window
    ids = torch.randint(3, 101, (512,)).tolist()
    caches = read("kvzip", ids, (512,), family="gpt2")
    rehearse(flat, caches, ids)
    assert all(c.length == 512 and (rated(c) > 0).all() for c in caches)


def dense_layer(n=40):
    cache = DenseLayer(LayerShape(2, 8, 6), torch.float32, CPU)
    cache.append(torch.randn(n, 2, 8), torch.randn(n, 2, 6))
    return cache


def test_scorers_of_keys():
    dense = dense_layer()
    k = dense.k[:, :40]
    torch.testing.assert_close(scores.KeyNorm().rate(dense), -k.norm(dim=-1))
    unit = k / k.norm(dim=-1, keepdim=True)
    mean = unit.mean(1, keepdim=True)
    likeness = (unit * mean).sum(-1) / mean.norm(dim=-1)
    torch.testing.assert_close(scores.KeyDifference().rate(dense), -likeness)
    assert scores.Recency().rate(dense)[1].tolist() == list(range(40))


def test_chance_depends_on_seed_and_layer_only():
    dense = dense_layer()
    drawn = [scores.Chance(s).rate(dense) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert math.isclose(float(drawn[0].mean()), 0.5, abs_tol=0.15)

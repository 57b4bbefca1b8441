"""A step of all layers in one call against one layer after the other, with every kind of cache."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from narrows.cache.stack import parse_cache
from narrows.contracts import FlatBatch
from narrows.ops.native import library
from tiny import pair
from tiny_caches import IDS, read

SMALL = "residual=16,group=16"
SPECS = [
    "dense",
    f"kivi:{SMALL},hold=9",
    f"xquant:{SMALL},key_hi=3,value_hi=2,value_share_from=1",
    f"xquant:{SMALL},value_share_from=0,borrow=lsq,fold=block,sink=3,hold=9",
    "snapkv:keep=0.5,window=8",
    "snapkv:keep=0.5,window=8,adaptive=true",
    "snapkv:keep=0.5,window=8,heads=per_query_head",
    "streaming:cap=45",
    "spindle:keep=0.6,theta_k=0.6,theta_v=0.6,window=4,tail=4,fold_every=8,pays=1",
    f"spindle:keep=0.6,window=4,tail=4,fold_every=8+kivi:{SMALL}",
]


NEVER = SimpleNamespace(takes=lambda rows: False)


class Watched:
    """A Decoder that notes its calls."""

    def __init__(self, run, calls) -> None:
        self.run, self.calls, self.takes = run, calls, run.takes

    def __call__(self, *given):
        self.calls.append(given)
        return self.run(*given)


@pytest.mark.skipif(library() is None, reason="no compiler here")
@pytest.mark.parametrize(
    ("spec", "family"),
    [*((spec, "llama") for spec in SPECS), ("dense", "mistral"), (SPECS[2], "qwen3")],
)
@torch.inference_mode()
def test_all_layers_at_once_are_one_after_the_other(monkeypatch, spec, family):
    """To the bit, and they hold the same afterwards; over steps in which caches quantise, evict and
    code. Steps that a cache is not ready for go layer by layer."""
    flat, _ = pair(family, torch.bfloat16)
    assert flat._fast is not None
    caches = []
    for prompt in (60, 47):
        own = parse_cache(spec).build(flat.shape)
        read(flat, own, IDS[:prompt], [prompt])
        for cache in own:
            cache.seal()
        caches.append(own)
    fast, calls, found, held = flat._fast, [], [], []
    run = fast.at_once

    for at_once in (True, False):
        monkeypatch.setattr(fast, "at_once", Watched(run, calls) if at_once else NEVER)
        mine, outs = copy.deepcopy(caches), []
        for number, counts in enumerate([(1, 1), (4, 1), (1, 3), *[(1, 1)] * 20, (9, 2)]):
            rows = sum(counts)
            spans = [(0, counts[0]), (counts[0], rows)]
            at = [torch.arange(n) + own[0].length for own, n in zip(mine, counts, strict=True)]
            ids = torch.tensor(IDS[number : number + rows])
            outs.append(flat.hidden(ids, torch.cat(at), FlatBatch(spans, mine)))
        found.append(outs)
        held.append([(cache.length, cache.nbytes) for own in mine for cache in own])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert held[0] == held[1]
    assert len(calls) > 15

"""Caches of tiny models, read and sealed, and what they hold: shared by the tests of caches."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from narrows.cache.evict_layer import EvictLayer
from narrows.cache.rehearse import rehearse
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import FlatBatch, LayerCache
from narrows.draft.specs import make_drafter
from narrows.engine.engine import Engine
from narrows.model.flat import FlatModel
from narrows.model.rotary import ModelRotary
from tiny import pair

IDS = (3 + torch.randperm(98, generator=torch.Generator().manual_seed(5))).tolist()
"""All of the vocabulary: the keys of a token that comes twice are of one norm but for rounding."""


def read(
    flat: FlatModel, caches: list[LayerCache], ids: list[int], chunks: list[int]
) -> list[Tensor]:
    """Read ``ids``, from where ``caches`` end, in chunks; the hidden states of each."""
    outs = []
    for n in chunks:
        start = caches[0].length
        outs.append(flat.read(ids[start : start + n], caches))
    return outs


def advance(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a cache of one sequence makes of new tokens in a step."""
    return FlatBatch([(0, len(q))], [[cache]]).attend(0, q, k, v, 0.2)


def sealed(spec: str, family: str = "llama", prompt: int = 60, chunks=(60,)):
    """A tiny model and its caches, sealed behind the first tokens of IDS."""
    flat, _ = pair(family)
    policy = parse_cache(spec)
    caches = policy.build(flat.shape)
    assert sum(chunks) == prompt
    read(flat, caches, IDS, list(chunks))
    if policy.rehearses:
        rehearse(flat, caches, IDS[:prompt])
    for cache in caches:
        cache.seal()
    return flat, caches


def held(caches: list[LayerCache]) -> list[list[Tensor]]:
    """What evicting layers hold, one entry a layer and KV head."""
    stores = [c.store for c in caches if isinstance(c, EvictLayer)]
    return [
        [x[0, :n] for side in (s.k, s.v) for x, n in zip(side, s.held, strict=True)] for s in stores
    ]


def run(
    spec: str,
    batch: list[list[int]],
    family: str = "llama",
    drafter: str | None = None,
    flat: FlatModel | None = None,
    **limits: int,
):
    """What an engine with this cache writes for each prompt, and the requests."""
    limits.setdefault("cache_bytes", 1 << 28)
    flat = flat or pair(family)[0]
    machine = Engine(
        flat, parse_cache(spec), EngineConfig(**limits), drafter and make_drafter(drafter, flat)
    )
    requests = [machine.submit(p, SamplingParams(max_tokens=20, ignore_eos=True)) for p in batch]
    for _ in machine.run():
        pass
    return [r.generated for r in requests], requests


def assert_bytes_are_storages(spec: str, flat: FlatModel, caches: list[LayerCache]) -> None:
    """``caches``, sealed behind 60 tokens, say what their storages take, within the estimate, now
    and as they grow."""
    policy = parse_cache(spec)
    for more in (0, 1, 19):
        if more:
            read(flat, caches, IDS, [more])
        total = sum(c.nbytes for c in caches)
        assert total == storages(caches)
        assert total <= policy.estimate(flat.shape, caches[0].length, 60)


def storages(caches: list[LayerCache]) -> int:
    """Bytes of the distinct storages that can be reached from ``caches``."""
    seen: dict[int, int] = {}

    def look(value: object, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for x in value:
                look(x, depth)
        elif isinstance(value, ModelRotary):
            pass  # the model's
        elif dataclasses.is_dataclass(value):
            look([getattr(value, field.name) for field in dataclasses.fields(value)], depth)
        elif depth < 5 and hasattr(value, "__dict__"):
            for name, x in vars(value).items():
                if name not in ("_fixed", "_codes"):  # what kernels are told of the rest
                    look(x, depth + 1)

    for cache in caches:
        look(cache)
    return sum(seen.values())

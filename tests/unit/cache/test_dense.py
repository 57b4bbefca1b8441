"""The laws every cache keeps, for the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.cache.dense import BLOCK, FEW, ROLLBACK, DenseLayer, DensePolicy
from narrows.cache.stack import parse_cache
from narrows.contracts import FlatBatch, LayerShape, ModelShape
from narrows.errors import ConfigError

CPU = torch.device("cpu")


def layer(window: int | None = None) -> DenseLayer:
    return DenseLayer(LayerShape(2, 4, 3, window), torch.float32, CPU)


def tokens(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.arange(n * 8, dtype=torch.float32).view(n, 2, 4)
    return k, torch.arange(n * 6, dtype=torch.float32).view(n, 2, 3)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.sampled_from([None, 17]))
def test_any_chunking_gives_the_same_state(chunks: list[int], window: int | None) -> None:
    k, v = tokens(sum(chunks))
    cache, at = layer(window), 0
    for n in chunks:
        cache.append(k[at : at + n], v[at : at + n])
        at += n
    stored_k, stored_v = cache.materialize()
    assert cache.length == at
    assert torch.equal(stored_k, k[cache.dropped :])
    assert torch.equal(stored_v, v[cache.dropped :])
    assert len(stored_k) >= (at if window is None else min(at, window))


@given(st.integers(1, 400), st.integers(1, 100), st.sampled_from([None, 17]))
def test_rollback_then_append_is_as_if_never(n: int, back: int, window: int | None) -> None:
    k, v = tokens(n + 100)
    cache = layer(window)
    cache.append(k[:n], v[:n])
    cache.append(torch.zeros(back, 2, 4), torch.zeros(back, 2, 3))
    cache.rollback(back)
    cache.append(k[n:], v[n:])
    stored, _ = cache.materialize()
    assert torch.equal(stored, k[cache.dropped :])


def test_rollback_refuses_what_it_cannot_do() -> None:
    cache = layer(window=10)
    with pytest.raises(ValueError, match="cannot roll back"):
        cache.rollback(1)
    for _ in range(20):
        cache.append(*tokens(100))
    assert cache.dropped > 0
    with pytest.raises(ValueError, match="sliding-window"):
        cache.rollback(ROLLBACK + 1)


def test_a_sliding_layer_frees_what_nobody_sees() -> None:
    cache = layer(window=10)
    for _ in range(100):
        cache.append(*tokens(50))
    assert cache.length == 5000
    assert cache.k.shape[1] < 2 * (10 + ROLLBACK + 50) + 2 * BLOCK


def test_bytes_are_those_of_the_buffers_and_within_the_estimate() -> None:
    shape = ModelShape("llama", (LayerShape(2, 4, 3),) * 2, 4, 8, 10, 999, torch.float32, CPU)
    policy = DensePolicy()
    caches = policy.build(shape)
    for n in (1, 2, 130, 300):
        for cache in caches:
            cache.append(*tokens(n))
        held = sum(c.nbytes for c in caches)
        assert held == sum(c.k.nbytes + c.v.nbytes for c in caches)  # type: ignore[attr-defined]
        assert held <= policy.estimate(shape, caches[0].length)


def test_specs_round_trip_and_bad_ones_are_refused() -> None:
    assert parse_cache("dense").spec == "dense"
    for spec, hint in (("dnse", "dense"), ("dense:x=1", "no option"), ("dense:x", "option=value")):
        with pytest.raises(ConfigError, match=hint):
            parse_cache(spec)


def test_a_batch_of_few_tokens_each_says_where_kernels_write_them() -> None:
    caches = [[layer(), layer(17)] for _ in range(2)]
    for one in (cache for some in caches for cache in some):
        one.append(*tokens(20))
    for count in (1, FEW):
        before = caches[0][0].length
        places = FlatBatch([(0, 1), (1, 1 + count)], caches).places()
        assert places is not None
        assert (places.dense_ends, places.coded_ends) == ([2, 4], [0, 0])
        assert [p.rows for p in places.dense] == [1, count] * 2
        assert [p.first_row for p in places.dense] == [0, 1] * 2
        assert places.dense[3].stored == caches[1][1].held
        assert caches[0][0].length == before + 1
    held = [cache.length for some in caches for cache in some]
    assert FlatBatch([(0, 1), (1, 2 + FEW)], caches).places() is None
    other = type("Other", (DenseLayer,), {"ready": lambda self, n: False})
    busy = other(caches[0][0].shape, torch.float32, CPU)
    assert FlatBatch([(0, 1)], [[caches[0][0], busy]]).places() is None
    assert FlatBatch([], []).places() is None
    assert held == [cache.length for some in caches for cache in some], "nothing was taken in"

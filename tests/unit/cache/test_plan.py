"""Plans at every depth, and what their closed forms promise while a sequence grows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.cache.quantized import QuantLayer, QuantPolicy
from narrows.cache.stack import parse_cache
from narrows.contracts import LayerCache, LayerShape, ModelShape
from narrows.errors import NumericalError
from tiny_caches import advance

SMALL = "residual=32,group=16,value_group=16"
SHARED = f"xquant:{SMALL},key_hi=2,value_hi=2,key_share_from=0,value_share_from=0"


def shape(layers: int, dim: int = 32) -> ModelShape:
    each = (LayerShape(2, dim, dim),) * layers
    return ModelShape("llama", each, 4, 64, 100, 10**6, torch.float32, torch.device("cpu"))


def policy(spec: str) -> QuantPolicy:
    made = parse_cache(spec)
    assert isinstance(made, QuantPolicy)
    return made


def rows(n: int, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    q = torch.randn(n, 4, dim, generator=g)
    return q, torch.randn(n, 2, dim, generator=g), torch.randn(n, 2, dim, generator=g)


def sealed(spec: str, tokens: int, layers: int = 2) -> list[LayerCache]:
    stack = policy(spec).build(shape(layers))
    _q, k, v = rows(tokens)
    for cache in stack:
        cache.append(k, v)
        cache.seal()
    return stack


@pytest.mark.parametrize("layers", range(1, 101))
def test_the_default_plan_is_legal_at_every_depth(layers: int) -> None:
    made = shape(layers)
    assert len(policy("xquant").build(made)) == layers
    assert policy("xquant").nominal_bits(made) == pytest.approx(
        1.375, abs=0.05 if layers > 6 else 0.4
    )
    assert policy("kivi").nominal_bits(made) == 2.0
    assert policy("asymkv").nominal_bits(made) == 1.5


@settings(max_examples=25)
@given(
    rule=st.sampled_from(["token", "block"]),
    sink=st.sampled_from([0, 5]),
    hold=st.sampled_from([0, 7]),
    tokens=st.integers(1, 400),
)
def test_the_estimate_bounds_every_shorter_length(
    rule: str, sink: int, hold: int, tokens: int
) -> None:
    """A request is admitted by its longest length, but tails are fuller on the way there."""
    made, spec = shape(4), f"xquant:{SMALL},fold={rule},sink={sink},hold={hold}"
    most = policy(spec).estimate(made, tokens, tokens)
    assert all(policy(spec).nbytes(made, t) <= most for t in range(1, tokens + 1, 3))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_estimate_bounds_what_is_held_within_a_step(rule: str) -> None:
    spec = f"kivi:{SMALL},fold={rule},hold=3"
    stack = sealed(spec, 30)
    for _ in range(100):
        for cache in stack:
            q, k, v = rows(1)
            cache.append(k, v)
            held = cache.nbytes
            assert held * 2 <= policy(spec).estimate(shape(2), cache.length, cache.length)
            cache.attend(q, 0.2)


@pytest.mark.parametrize("tokens", [1, 3, 5, 6, 12])
def test_a_sink_gives_tokens_back_while_nothing_is_quantised(tokens: int) -> None:
    spec = f"kivi:{SMALL},sink=5,hold=7"
    back = min(7, tokens)
    stack, never = sealed(spec, tokens), sealed(spec, max(tokens - back, 0))
    q, k, v = rows(60)
    for a, b in zip(stack, never, strict=True):
        a.rollback(back)
        assert a.length == tokens - back
        step = [advance(c, q, k, v) for c in (a, b)]
        if tokens == back:
            torch.testing.assert_close(step[0], step[1])
    for cache in stack:
        _, stored = cache.materialize()
        assert cache.length == len(stored) == tokens - back + 60


def test_a_borrower_never_reads_codes_its_owner_has_not_written() -> None:
    """Appending to all layers before any attends leaves the owner's newest tokens unquantised;
    its lines have room for them already, so zeros would pass for codes."""
    stack = sealed(SHARED, 50)
    q, k, v = rows(60)
    for cache in stack:
        cache.append(k, v)
    stack[1].attend(q[-1:], 0.2)
    owner, borrower = stack
    assert isinstance(owner, QuantLayer)
    assert isinstance(borrower, QuantLayer)
    for mine, theirs in zip(borrower._sealed, owner._sealed, strict=True):
        assert mine.codes.tokens <= theirs.codes.tokens
    for mine, theirs in zip(borrower.materialize(), owner.materialize(), strict=True):
        assert torch.equal(mine, theirs)  # both were given the same tokens


def test_appending_everywhere_first_changes_no_attention() -> None:
    """A borrower's append must not fold what its owner has yet to attend to."""
    by_layer, by_stage = sealed(SHARED, 50), sealed(SHARED, 50)
    q, k, v = rows(1)
    first = [advance(c, q, k, v) for c in by_layer]
    for cache in by_stage:
        cache.append(k, v)
    second = [cache.attend(q, 0.2) for cache in by_stage]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_numbers_that_are_refused_leave_nothing_behind() -> None:
    cache = sealed(f"kivi:{SMALL}", 63, layers=1)[0]
    assert isinstance(cache, QuantLayer)
    codes = [side.codes for side in cache._sealed]
    before = [(c.tokens, c.lines.clone()) for c in codes if c.lines is not None]
    bad = torch.full((1, 2, 32), float("nan"))
    cache.append(bad, bad)
    with pytest.raises(NumericalError, match="keys of layer 0"):
        cache.attend(rows(1)[0], 0.2)
    for code, (tokens, lines) in zip(codes, before, strict=True):
        assert code.tokens == tokens
        assert code.lines is not None
        assert torch.equal(code.lines, lines)

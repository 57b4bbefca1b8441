"""The quantised caches: their laws, an independent reference, and their byte counts."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.cache.dense import DensePolicy
from narrows.cache.plan import folded
from narrows.cache.quantized import QuantLayer, QuantPolicy
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import FlatBatch, LayerCache, LayerShape, ModelShape
from narrows.engine.engine import Engine
from narrows.errors import ConfigError, NumericalError
from oracles import kivi_reference
from tiny import pair, prompts
from tiny_caches import advance

CPU = torch.device("cpu")
SMALL = "residual=32,group=16,value_group=16"


def shape(
    layers: int = 4, heads: int = 2, dim: int = 32, dtype: torch.dtype = torch.float32, **other: int
) -> ModelShape:
    layer = LayerShape(heads, dim, other.get("value_dim", dim))
    return ModelShape("llama", (layer,) * layers, 2 * heads, 64, 100, 100_000, dtype, CPU)


def policy(spec: str) -> QuantPolicy:
    made = parse_cache(spec)
    assert isinstance(made, QuantPolicy)
    return made


def data(n: int, made: ModelShape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    layer = made.layers[0]
    q = torch.randn(n, made.heads, layer.key_dim, generator=g)
    k = torch.randn(n, layer.kv_heads, layer.key_dim, generator=g)
    return q, k, torch.randn(n, layer.kv_heads, layer.value_dim, generator=g)


def run(
    stack: list[LayerCache], n: int, chunks: list[int], made: ModelShape, prompt: int
) -> Tensor:
    """Feed ``n`` tokens to every layer in chunks, the first ``prompt`` before the seal; returns
    the outputs of all steps behind the prompt."""
    bounds = sorted({prompt, n, *(min(n, sum(chunks[:i])) for i in range(1, len(chunks) + 1))})
    outs, at = [], 0
    for stop in bounds:
        step = []
        for number, cache in enumerate(stack):
            q, k, v = (x.to(made.dtype) for x in data(n, made, number))
            rows = slice(at, stop)
            step.append(advance(cache, q[rows], k[rows], v[rows]))
        if at >= prompt:
            outs.append(torch.stack(step))
        at = stop
        if at == prompt:
            for cache in stack:
                cache.seal()
    return torch.cat(outs, 1) if outs else torch.empty(0)


def state(stack: list[LayerCache]) -> list[Tensor]:
    """Everything stored, in order."""
    found = []
    for cache in stack:
        assert isinstance(cache, QuantLayer)
        for side in cache._sealed:
            codes = side.codes
            found += [side.tail[:, : side.tail_tokens], side.sink]
            for x in (codes.lines, *(m for m in (codes.scale, codes.zero) if m is not None)):
                if isinstance(x, Tensor):
                    found.append(x)
                elif x is not None:
                    found.append(getattr(x, "values", getattr(x, "codes", None)))
    return found


SPECS = [
    f"kivi:{SMALL}",
    f"kivi:bits=8,{SMALL},sink=3",
    f"asymkv:{SMALL}",
    f"xquant:{SMALL},key_hi=4,value_hi=0,key_share_from=0,value_share_from=0",
    f"xquant:{SMALL},key_hi=4,value_hi=2,value_share_from=0,borrow=lsq,hold=5",
    f"xquant:{SMALL},key_hi=4,value_hi=4,value_share_from=0,borrow=mean,fold=block",
    f"xquant:{SMALL},key_meta=int8,value_meta=int4,fold=block,sink=5,hold=7",
]


@pytest.mark.parametrize("spec", SPECS)
def test_spec_round_trip(spec: str) -> None:
    made = policy(spec)
    assert policy(made.spec) == made
    assert policy(policy(made.spec).spec).spec == made.spec


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=12, deadline=None)
@given(
    prompt=st.integers(1, 130),
    more=st.integers(1, 90),
    chunks=st.lists(st.integers(1, 60), max_size=8),
)
def test_any_chunking_gives_the_same_state_and_output(
    spec: str, prompt: int, more: int, chunks: list[int]
) -> None:
    made, total = shape(), prompt + more
    one, many = (policy(spec).build(made) for _ in range(2))
    by_one = run(one, total, [1] * total, made, prompt)
    in_chunks = run(many, total, chunks, made, prompt)
    torch.testing.assert_close(in_chunks, by_one, rtol=1e-4, atol=1e-4)
    for a, b in zip(state(one), state(many), strict=True):
        assert torch.equal(a, b)
    assert {c.length for c in many} == {total}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 63, 64, 65, 100, 128, 129])
def test_bytes_equal_the_closed_form(spec: str, tokens: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = shape(dtype=dtype)
        stack = policy(spec).build(made)
        run(stack, tokens, [tokens], made, tokens)
        assert sum(c.nbytes for c in stack) == policy(spec).nbytes(made, tokens)
        run_on = policy(spec).build(made)
        run(run_on, tokens, [1] * tokens, made, max(1, tokens // 2))
        assert sum(c.nbytes for c in run_on) == policy(spec).nbytes(made, tokens)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_distinct_storages(spec: str) -> None:
    made = shape()
    stack = policy(spec).build(made)
    run(stack, 100, [100], made, 90)
    storages: dict[int, int] = {}

    def walk(x: object, seen: list[object]) -> None:
        if any(x is y for y in seen):
            return
        seen.append(x)
        if isinstance(x, Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, list | tuple):
            for y in x:
                walk(y, seen)
        elif hasattr(x, "__dict__") and type(x).__module__.startswith("narrows"):
            walk(list(vars(x).values()), seen)

    walk(stack, [])
    storages.pop(0, None)
    assert sum(c.nbytes for c in stack) == sum(storages.values())


def test_sizes_on_the_default_model_and_on_a_wide_one() -> None:
    ours = shape(30, 3, 64, torch.bfloat16)
    wide = shape(32, 8, 128, torch.bfloat16)
    small = "xquant:key_meta=int8,value_meta=int8,fold=block"
    sizes = {
        (name, spec): policy(spec).true_bits(made, 8192)
        for name, made in (("ours", ours), ("wide", wide))
        for spec in ("kivi", "xquant", small, "kivi:value_group=128", "xquant:value_group=128")
    }
    assert sizes["ours", "kivi"] <= 2.49
    assert sizes["ours", "xquant"] <= 1.88
    assert sizes["ours", small] <= 1.62
    assert sizes["wide", "kivi:value_group=128"] <= 2.36
    assert sizes["wide", "xquant:value_group=128"] <= 1.75
    assert sizes["wide", small] <= 1.62
    assert policy("xquant").nominal_bits(ours) == pytest.approx(1.38, abs=0.005)
    assert policy("xquant").nominal_bits(wide) == 1.375


def test_closed_form_of_the_sheet() -> None:
    """Section 7.2, for lengths at which nothing is rounded; but our tails of values have room for
    the token that pushes another out."""
    made = shape(32, 8, 128, torch.float16)
    for spec, tokens, bits in (
        ("kivi:group=32,value_group=32", 1024, 3.81),
        ("kivi:group=32,value_group=32", 8192, 3.10),
        ("xquant:group=32,value_group=32", 4096, 2.60),
        ("xquant:value_group=128", 8192, 1.74),
        ("kivi:value_group=128", 32768, 2.28),
    ):
        assert policy(spec).true_bits(made, tokens) == pytest.approx(bits + 8 / tokens, abs=0.006)


@pytest.mark.parametrize(
    ("plan", "bits"),
    [
        ((32, 32, 32, 32), 2.0),
        ((32, 0, 32, 32), 1.5),
        ((30, 2, 32, 16), 1.375),
        ((32, 0, 32, 16), 1.375),
        ((32, 2, 32, 16), 1.40625),
        ((30, 0, 32, 16), 1.34375),
        ((32, 0, 32, 0), 1.25),
    ],
)
def test_nominal_bits(plan: tuple[int, int, int, int], bits: float) -> None:
    names = ("key_hi", "value_hi", "key_share_from", "value_share_from")
    spec = "xquant:" + ",".join(f"{n}={x}" for n, x in zip(names, plan, strict=True))
    assert policy(spec).nominal_bits(shape(32)) == bits


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [20, 32, 70, 97])
def test_equals_an_independent_kivi(bits: int, tokens: int) -> None:
    made = shape(1)
    stack = policy(f"kivi:bits={bits},{SMALL}").build(made)
    run(stack, tokens, [1] * tokens, made, tokens // 2)
    _, k, v = (x.transpose(0, 1) for x in data(tokens, made))
    got_k, got_v = (x.transpose(0, 1) for x in stack[0].materialize())
    assert torch.equal(got_k, kivi_reference.keys(k, tokens, 32, 16, bits))
    assert torch.equal(got_v, kivi_reference.values(v, tokens, 32, 16, bits))


def test_a_borrower_holds_no_codes_and_keeps_its_owner() -> None:
    made = shape()
    stack = policy(SPECS[3]).build(made)
    run(stack, 100, [100], made, 100)
    owner, borrower = stack[2], stack[3]
    assert isinstance(borrower, QuantLayer)
    assert isinstance(owner, QuantLayer)
    for mine, theirs in zip(borrower._sealed, owner._sealed, strict=True):
        assert mine.codes.lines is None
        assert mine.codes.borrowed is theirs.codes.lines
    kept = borrower.materialize()[0].clone()
    del owner, stack
    assert torch.equal(borrower.materialize()[0], kept)


def test_a_borrower_of_equal_data_equals_its_owner_and_of_other_data_does_not() -> None:
    made = shape(2)
    spec = f"xquant:{SMALL},key_hi=2,value_hi=2,key_share_from=0,value_share_from=0"
    stack = policy(spec).build(made)
    q, k, v = data(100, made)
    for cache in stack:
        advance(cache, q, k, v)
    for cache in stack:
        cache.seal()
    first, second = (cache.materialize() for cache in stack)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    other = policy(spec).build(made)
    run(other, 100, [100], made, 100)
    own = policy(f"xquant:{SMALL},key_hi=2,value_hi=2,key_share_from=2,value_share_from=2")
    alone = own.build(made)
    run(alone, 100, [100], made, 100)
    assert torch.equal(other[0].materialize()[0], alone[0].materialize()[0])
    assert not torch.equal(other[1].materialize()[0], alone[1].materialize()[0])


@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_lives_on_its_own(spec: str) -> None:
    made = shape()
    stack = policy(spec).build(made)
    run(stack, 91, [90], made, 80)
    forked = copy.deepcopy(stack)
    before = [x.clone() for x in state(stack)]
    for a, b in zip(stack, forked, strict=True):
        for x, y in zip(a.materialize(), b.materialize(), strict=True):
            assert torch.equal(x, y)
    q, k, v = data(50, made, seed=9)

    def go_on(stack: list[LayerCache]) -> None:
        for cache in stack:
            for rows in (
                slice(0, 1),
                slice(1, 2),
                slice(2, 50),
            ):  # the first alone: in known storages
                advance(cache, q[rows], k[rows], v[rows])

    go_on(forked)
    for x, y in zip(state(stack), before, strict=True):
        assert torch.equal(x, y)
    go_on(stack)
    for x, y in zip(state(stack), state(forked), strict=True):
        assert torch.equal(x, y)
    for place, cache in enumerate(forked):
        assert isinstance(cache, QuantLayer)
        for owner in cache.owners:
            assert owner is None or owner is forked[place - 1]


ROLLED_BACK = [
    f"xquant:{SMALL},key_hi=4,value_hi=2,value_share_from=0,hold=5",
    f"xquant:{SMALL},value_share_from=0,borrow=lsq,fold=block,sink=3,hold=5",
    f"kivi:{SMALL},key_meta=int8,value_meta=int4,fold=block,hold=5",
    f"kivi:{SMALL},bits=4,sink=2,hold=5",
]


@pytest.mark.parametrize("spec", ROLLED_BACK)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 110),
    steps=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=8),
)
def test_what_is_rolled_back_was_never_there(
    spec: str, tokens: int, steps: list[tuple[int, int]]
) -> None:
    """Drafts of other tokens between the steps change nothing, to the bit, at any length."""
    made = shape()
    ahead, plain = (policy(spec).build(made) for _ in range(2))
    for stack in (ahead, plain):
        run(stack, tokens, [tokens], made, tokens)
    for number, (n, draft) in enumerate(steps):
        wrong, right = data(draft, made, seed=100 + number), data(n, made, seed=200 + number)
        for cache in ahead if draft else ():
            advance(cache, *wrong)
        for cache in ahead:
            cache.rollback(draft)
        for a, b in zip(ahead, plain, strict=True):
            mine, theirs = (advance(c, *right) for c in (a, b))
            assert torch.equal(mine, theirs)
    for x, y in zip(state(ahead), state(plain), strict=True):
        assert torch.equal(x, y)


def test_quantised_tokens_cannot_be_rolled_back() -> None:
    made = shape()
    stack = policy(f"kivi:{SMALL}").build(made)
    run(stack, 64, [64], made, 64)
    with pytest.raises(ValueError, match="hold=3"):
        stack[0].rollback(3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kivi:bits=3", "bits"),
        ("kivi:group=24", "group must be a multiple of 16"),
        ("kivi:residual=100", "residual must be a multiple of group"),
        ("kivi:value_meta=int8", "fold=block"),
        ("xquant:eta1=0.7", "eta1"),
        ("xquant:nonsense=1", "nonsense"),
        ("xquant:borrow=best", "borrow"),
        ("kivi:bits=two", "bits"),
    ],
)
def test_bad_options_are_refused_when_parsed(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cache(spec)


@pytest.mark.parametrize(
    ("spec", "made", "message"),
    [
        ("xquant:key_hi=3,key_share_from=0", shape(8), "layers 2 and 3 cannot share"),
        ("kivi", shape(2, dim=30), "key head size 30"),
        ("kivi", shape(2, dim=32, value_dim=40), "value head size 40"),
        ("kivi:value_group=48", shape(2, dim=64), "value_group 48"),
        ("xquant:value_pairs=3+4", shape(8), "layer 4 cannot be borrowed"),
        ("xquant:value_pairs=0", shape(8), "layer 0 cannot be borrowed"),
        ("kivi:value_at=3-8", shape(8), "layers 3-8 cannot have"),
        ("kivi:key_at=4-2", shape(8), "layers 4-2 cannot have"),
        ("xquant:key_pairs=8", shape(8), "layer 8 cannot be borrowed"),
        ("xquant:key_hi=4,key_pairs=4", shape(8), "layers 3 and 4 cannot share"),
    ],
)
def test_illegal_plans_are_refused_when_built(spec: str, made: ModelShape, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cache(spec).build(made)


def test_layers_of_different_shape_do_not_share() -> None:
    narrow, wide = LayerShape(2, 32, 32), LayerShape(2, 64, 64)
    made = ModelShape("x", (narrow, wide), 4, 64, 100, 1000, torch.float32, CPU)
    with pytest.raises(ConfigError, match="differ in heads or head size"):
        parse_cache("xquant:value_share_from=0,key_hi=2,value_hi=2").build(made)


def test_named_pairs_take_the_place_of_the_threshold() -> None:
    made = shape(8)
    plans = policy("xquant:value_hi=0,value_pairs=2+5").plan(made)
    assert {p.place: p.value.owner for p in plans if p.value.owner is not None} == {2: 1, 5: 4}
    assert policy("xquant:value_pairs=2+5").spec == "xquant:value_pairs=2+5"
    with pytest.raises(ConfigError, match="value_pairs"):
        parse_cache("xquant:value_pairs=2-5")


def test_a_run_of_layers_takes_the_place_of_the_threshold() -> None:
    made = policy("kivi:bits=8,lo_bits=4,value_at=2-4,key_at=0-0")
    plans = made.plan(shape(6))
    assert [plan.value.bits for plan in plans] == [4, 4, 8, 8, 8, 4]
    assert [plan.key.bits for plan in plans] == [8, 4, 4, 4, 4, 4]
    assert parse_cache(made.spec) == made


def test_pairs_are_counted_among_full_attention_layers() -> None:
    full, sliding = LayerShape(2, 32, 32), LayerShape(2, 32, 32, window=8)
    layers = (sliding, full, sliding, sliding, full, full)
    made = ModelShape("gemma3_text", layers, 4, 64, 100, 1000, torch.float32, CPU)
    spec = f"xquant:{SMALL},key_hi=3,value_hi=0,value_share_from=0"
    plans = policy(spec).plan(made)
    assert [(p.place, p.value.owner) for p in plans] == [(1, None), (4, 1), (5, None)]
    kinds = [type(c).__name__ for c in policy(spec).build(made)]
    assert kinds == [
        "DenseLayer",
        "QuantLayer",
        "DenseLayer",
        "DenseLayer",
        "QuantLayer",
        "QuantLayer",
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_an_error(bad: float) -> None:
    made = shape()
    stack = policy(f"kivi:{SMALL}").build(made)
    _q, k, v = data(64, made)
    k[3, 1, 2] = bad
    stack[0].append(k, v)
    with pytest.raises(NumericalError, match="keys of layer 0"):
        stack[0].seal()


def test_numbers_too_large_for_half_precision_metadata_are_an_error() -> None:
    made = shape()
    _q, k, v = data(64, made)
    v[0] *= 1e6
    for meta, fails in (("fp16", True), ("bf16", False)):
        stack = policy(f"kivi:{SMALL},value_meta={meta}").build(made)
        stack[0].append(k, v)
        if fails:
            with pytest.raises(NumericalError, match="meta bf16"):
                stack[0].seal()
        else:
            stack[0].seal()


# ----------------------------------------------------------------------------------- in the engine

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


def generate(
    spec: str, batch: list[list[int]], family: str = "llama", **limits: int
) -> list[list[int]]:
    limits.setdefault("cache_bytes", 1 << 28)
    machine = Engine(pair(family)[0], parse_cache(spec), EngineConfig(**limits))
    requests = [machine.submit(p, GREEDY) for p in batch]
    for _ in machine.run():
        pass
    return [r.generated for r in requests]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("spec", [f"kivi:bits=4,{SMALL}", f"xquant:{SMALL},hold=3"])
def test_alone_and_in_a_batch_give_the_same_tokens(spec: str, family: str) -> None:
    batch = prompts(6, longest=150, seed=4)
    alone = [generate(spec, [p], family)[0] for p in batch]
    assert generate(spec, batch, family) == alone
    assert generate(spec, batch, family, prefill_chunk=13) == alone


def test_prefill_is_exact_and_decoding_is_not() -> None:
    flat = pair("llama")[0]
    ids = torch.tensor(prompts(1, longest=150, seed=5)[0] * 2)[:150]
    stacks = [DensePolicy().build(flat.shape), parse_cache(f"kivi:{SMALL}").build(flat.shape)]
    first, second = [], []
    for stack in stacks:
        place = torch.arange(len(ids))
        first.append(flat.hidden(ids, place, FlatBatch([(0, len(ids))], [stack])))
        for cache in stack:
            cache.seal()
        one = torch.tensor([7])
        second.append(flat.hidden(one, torch.tensor([len(ids)]), FlatBatch([(0, 1)], [stack])))
    assert torch.equal(first[0], first[1])
    assert (second[0] - second[1]).abs().max() > 1e-3


def test_more_requests_fit_a_byte_budget_than_dense() -> None:
    made = pair("llama")[0].shape
    spec = parse_cache(f"kivi:{SMALL}")
    dense = DensePolicy().estimate(made, 400, 400)
    assert spec.estimate(made, 400, 400) < dense / 2
    assert spec.estimate(made, 400) == DensePolicy().estimate(made, 400)


def test_folded_counts() -> None:
    options = policy("kivi:residual=32,group=16,sink=4,hold=2").options
    assert [folded(options, "block", t) for t in (0, 35, 36, 68)] == [0, 0, 32, 64]
    assert [folded(options, "token", t) for t in (0, 36, 37, 68)] == [0, 0, 1, 32]

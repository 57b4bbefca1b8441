"""Likeness of layers against chance, and the plan chosen from it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.cache.quantized import QuantPolicy
from narrows.cache.similarity import (
    Likeness,
    PairLikeness,
    SimilarityReport,
    beyond_chance,
    choose_shared,
    compare,
    measure,
    propose,
)
from narrows.cache.stack import parse_cache
from narrows.contracts import LayerShape, ModelShape
from narrows.errors import BudgetError, ConfigError, InputError, NumericalError, UnsupportedModel
from tiny import pair as tiny_pair

fresh = tiny_pair.__wrapped__
"""A model that no other test has: its weights may be written to."""


def gaussians(size: int, count: int = 20_000, heads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, heads, count, size), generator=generator)
    return a, b


@pytest.mark.parametrize(("size", "near", "apart"), [(32, 0.816, 0.021), (128, 0.903, 0.005)])
def test_independent_tensors_have_the_papers_agreement(
    size: int, near: float, apart: float
) -> None:
    """The warning of the design sheet, 5.1: "over 80% differ by 0 or 1" is what chance gives."""
    found = compare(*gaussians(size), bits=2)
    assert found.near[0] == pytest.approx(near, abs=0.003)
    assert found.top[0] == pytest.approx(0.5, abs=0.005)
    assert abs(found.codes[0]) < 0.005
    assert abs(found.plain[0]) < 0.005
    # A line through n points explains 1 / (n - 1) of unrelated ones.
    assert found.explained[0] == pytest.approx(1 / (size - 1), rel=0.05)


def test_equal_tensors_agree_wholly() -> None:
    a, _ = gaussians(32)
    found = compare(a, 3.0 * a + 7.0, bits=2)  # each has its own scale and zero
    assert found.near == found.top == (1.0,)
    assert found.codes[0] == pytest.approx(1.0)
    assert found.plain[0] == pytest.approx(1.0)
    assert found.explained[0] == pytest.approx(0.87, abs=0.01)  # what 2 bits keep of a Gaussian


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_is_related_is_found_whatever_its_sign(bits: int) -> None:
    a, b = gaussians(64)
    for sign in (1.0, -1.0):
        found = compare(a, sign * 0.8 * a + 0.6 * b, bits)
        assert found.plain[0] == pytest.approx(sign * 0.8, abs=0.005)
        assert (found.codes[0] > 0.4) == (sign > 0)
        assert (found.top[0] > 0.6) == (sign > 0)
        assert found.explained[0] > 0.35


def test_heads_are_told_apart() -> None:
    a, b = gaussians(32, count=2000, heads=2)
    found = compare(a, torch.stack([a[0], b[1]]), bits=2)
    assert found.top[0] == 1.0
    assert found.top[1] < 0.55


def test_constant_groups_explain_nothing_and_break_nothing() -> None:
    a, b = gaussians(32, count=10)
    flat = torch.zeros_like(a)
    for x, y in ((flat, b), (a, flat), (flat, flat)):
        found = compare(x, y, bits=2)
        assert found.codes == found.plain == found.explained == (0.0,)


# ---------------------------------------------------------------------------------- of a model


def ids(n: int) -> list[int]:
    return torch.randint(3, 101, (n,), generator=torch.Generator().manual_seed(1)).tolist()


def test_a_model_is_compared_pair_by_pair() -> None:
    model = tiny_pair("llama")[0]
    report = measure(model, ids(70), group=16, value_group=16)
    assert (report.tokens, report.layers) == (64, (0, 1, 2))
    assert [(p.tensor, p.layers) for p in report.pairs] == [
        ("keys", (0, 1)),
        ("keys", (1, 2)),
        ("values", (0, 1)),
        ("values", (1, 2)),
    ]
    assert all(len(p.text.near) == 2 for p in report.pairs)
    assert report == measure(model, ids(70), group=16, value_group=16)
    assert report != measure(model, ids(70), group=16, value_group=16, seed=1)


def test_a_layer_that_repeats_its_neighbour_stands_out() -> None:
    """The positive control in a whole model: the second layer computes the keys and values of
    the first, since the first one adds nothing to what it reads."""
    flat, _ = fresh("llama", num_hidden_layers=4)
    layers = flat.model.base_model.layers
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            getattr(layers[1].self_attn, name).weight.copy_(
                getattr(layers[0].self_attn, name).weight
            )
        layers[1].input_layernorm.weight.copy_(layers[0].input_layernorm.weight)
        layers[0].self_attn.o_proj.weight.zero_()
        layers[0].mlp.down_proj.weight.zero_()
    flat = type(flat)(flat.model, None, "twin")  # anew: the fast pass keeps copies of weights
    report = measure(flat, ids(300), group=32, value_group=16)
    for found in report.pairs:
        twin = found.layers == (0, 1)
        assert (min(found.text.top) > 0.99) == twin
        assert (beyond_chance(found) > 0.5) == twin
        assert max(found.chance.top) < 0.65
    chosen = choose_shared(report, nominal=1.75, key_bits=[2] * 4, value_bits=[2] * 4)
    assert chosen.values == [(0, 1)]


def test_hybrid_models_are_compared_between_full_attention_layers() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = fresh("gemma3_text", layer_types=kinds)[0]
    report = measure(model, ids(64), group=16, value_group=16)
    assert report.layers == (0, 3)
    assert {p.layers for p in report.pairs} == {(0, 3)}


def test_what_cannot_be_compared_is_refused() -> None:
    model = tiny_pair("llama")[0]
    with pytest.raises(InputError, match=r"31 tokens; .* two groups, 32"):
        measure(model, ids(31), group=16)
    with pytest.raises(InputError, match="more than"):
        measure(model, ids(513), group=16)
    with pytest.raises(ConfigError, match="value_group 12"):
        measure(model, ids(64), group=16, value_group=12)
    with pytest.raises(ConfigError, match="at least 2"):
        measure(model, ids(64), group=1)
    with pytest.raises(ConfigError, match="bits must be one of 1, 2, 4, 8"):
        measure(model, ids(64), bits=3)
    with pytest.raises(UnsupportedModel, match="no two neighbouring"):
        measure(tiny_pair("mistral")[0], ids(64), group=16)


def test_numbers_that_are_not_finite_are_refused() -> None:
    flat, _ = fresh("llama", num_hidden_layers=2)
    flat.model.base_model.layers[1].self_attn.k_proj.weight.data.fill_(float("inf"))
    broken = type(flat)(flat.model, None, "broken")
    with pytest.raises(NumericalError, match="keys of layer 1 of broken"):
        measure(broken, ids(64), group=16)


# ------------------------------------------------------------------------------------ the choice


def report_of(keys: list[float], values: list[float]) -> SimilarityReport:
    """A report with that much explained, pair by pair."""
    pairs = []
    for tensor, explained in (("keys", keys), ("values", values)):
        for i, x in enumerate(explained):
            one = Likeness((0.8,), (0.5,), (0.0,), (0.0,), (x,))
            chance = replace(one, explained=(0.0,))
            pairs.append(PairLikeness(tensor, (2 * i, 2 * i + 2), one, chance))
    layers = tuple(2 * i for i in range(len(values) + 1))
    return SimilarityReport("made", 1, 2, 1, 1, 0, layers, tuple(pairs))


def test_the_best_pair_is_shared_first() -> None:
    report = report_of([0.9, 0.9, 0.9], [0.1, 0.8, 0.3])
    widths = {"key_bits": [2] * 4, "value_bits": [2] * 4}
    assert choose_shared(report, nominal=2.0, **widths).values == []
    one = choose_shared(report, nominal=1.75, **widths)
    assert (one.keys, one.values, one.nominal) == ([], [(2, 4)], 1.75)
    two = choose_shared(report, nominal=1.5, **widths)
    assert two.values == [(0, 2), (4, 6)]  # not the best pair, which leaves no other
    both = choose_shared(report, nominal=1.5, **widths, tensors=("keys", "values"))
    assert sum(map(len, both[:2])) == 2
    assert both.nominal == 1.5


def test_a_pair_of_two_widths_is_never_shared() -> None:
    report = report_of([0, 0], [0.9, 0.1])
    chosen = choose_shared(report, nominal=5 / 3, key_bits=[2] * 3, value_bits=[2, 1, 1])
    assert chosen.values == []
    chosen = choose_shared(report, nominal=1.5, key_bits=[2] * 3, value_bits=[2, 1, 1])
    assert chosen.values == [(2, 4)]


def test_a_choice_that_cannot_be_made_is_refused() -> None:
    report = report_of([0.5], [0.5])
    with pytest.raises(BudgetError, match=r"reaches 1.5 nominal bits at best, not 1.25"):
        choose_shared(report, nominal=1.25, key_bits=[2, 2], value_bits=[2, 2])
    with pytest.raises(ConfigError, match="2 full-attention layers"):
        choose_shared(report, nominal=2, key_bits=[2], value_bits=[2, 2])
    with pytest.raises(ConfigError, match="keys and values"):
        choose_shared(report, nominal=2, key_bits=[2, 2], value_bits=[2, 2], tensors=("both",))


share = st.floats(0, 1).map(lambda x: round(x, 3))


@given(st.data(), st.integers(2, 6), st.sampled_from([("values",), ("keys", "values")]))
def test_no_legal_choice_loses_less(
    data: st.DataObject, count: int, tensors: tuple[str, ...]
) -> None:
    explained = [
        data.draw(st.lists(share, min_size=count - 1, max_size=count - 1)) for _ in range(2)
    ]
    widths = [
        data.draw(st.lists(st.sampled_from([1, 2]), min_size=count, max_size=count))
        for _ in range(2)
    ]
    nominal = data.draw(st.floats(0.8, 2.0))
    report = report_of(*explained)
    names = ("keys", "values")
    legal = [
        (t, i)
        for t in range(2)
        if names[t] in tensors
        for i in range(count - 1)
        if widths[t][i] == widths[t][i + 1]
    ]

    def disjoint(chosen: tuple[tuple[int, int], ...]) -> bool:
        return all((t, i + 1) not in chosen for t, i in chosen)

    whole = sum(map(sum, widths))
    losses = [
        sum(1 - explained[t][i] for t, i in chosen)
        for n in range(len(legal) + 1)
        for chosen in itertools.combinations(legal, n)
        if disjoint(chosen)
        and whole - sum(widths[t][i] for t, i in chosen) <= 2 * count * nominal + 1e-9
    ]

    def ask() -> float:
        made = choose_shared(
            report, nominal=nominal, key_bits=widths[0], value_bits=widths[1], tensors=tensors
        )
        assert made.nominal <= nominal + 1e-9
        chosen = tuple((t, pair[0] // 2) for t in range(2) for pair in made[t])
        assert set(chosen) <= set(legal)
        assert disjoint(chosen)
        return sum(1 - explained[t][i] for t, i in chosen)

    if losses:
        assert ask() == pytest.approx(min(losses))
    else:
        with pytest.raises(BudgetError):
            ask()


@pytest.mark.parametrize("tensors", [("values",), ("keys", "values"), ("keys",)])
@pytest.mark.parametrize("count", [4, 7, 30, 32])
def test_the_proposed_spec_is_a_legal_plan_of_no_more_bits(
    tensors: tuple[str, ...], count: int
) -> None:
    chance = random.Random(count)
    report = report_of(*([chance.random() for _ in range(count - 1)] for _ in range(2)))
    layer = LayerShape(2, 32, 32)
    # The report's layers are every other one of the model's.
    sliding = LayerShape(2, 32, 32, window=8)
    layers = tuple(x for _ in range(count) for x in (layer, sliding))
    shape = ModelShape("x", layers, 4, 64, 100, 1000, torch.float32, torch.device("cpu"))
    made, usual = parse_cache(propose(report, tensors)), parse_cache("xquant")
    made.build(shape)
    assert isinstance(made, QuantPolicy)
    assert isinstance(usual, QuantPolicy)
    assert made.nominal_bits(shape) <= usual.nominal_bits(shape)

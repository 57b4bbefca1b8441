"""Processors and truncation against a slow reference, the draw against its distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.config import SamplingParams
from narrows.contracts import Draft
from narrows.engine.sampling import Sampler
from narrows.engine.verify import verify_batch
from narrows.errors import ConfigError, NumericalError
from oracles import sampling_reference
from tiny_scores import Given

V = 23
EOS = frozenset({2, 5})
PROMPT = [1, 2, 3, 3, 7]

tokens = st.integers(0, V - 1)
# A coarse grid makes ties common; with noise they are rare, so no sum lies on a top-p boundary.
rows = st.lists(st.integers(-8, 8), min_size=V, max_size=V).map(lambda r: [x / 2 for x in r])
noisy = st.tuples(rows, st.integers(0, 2**32)).map(
    lambda r: (
        torch.tensor(r[0]) + torch.rand(V, generator=torch.Generator().manual_seed(r[1]))
    ).tolist()
)


@st.composite
def processor_settings(draw):
    return SamplingParams(
        min_tokens=draw(st.integers(0, 4)),
        repetition_penalty=draw(st.sampled_from([1.0, 0.5, 1.3, 2.0])),
        presence_penalty=draw(st.sampled_from([0.0, -1.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.5, 1.1])),
        logit_bias=draw(st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=3)),
        stop_token_ids=tuple(draw(st.lists(tokens, max_size=2))),
    )


@st.composite
def truncation_settings(draw):
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0, 100.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 5, V, V + 9])),
        top_p=draw(st.sampled_from([1.0, 0.9137, 0.5219, 0.0113])),
        min_p=draw(st.sampled_from([0.0, 0.0317, 0.2113, 1.0])),
    )


def sample_batch(samplers, logits, said):
    """One token each: a batch without drafts."""
    drafts = [Draft([])] * len(samplers)
    return [one for (one,) in verify_batch(samplers, Given(logits), said, drafts)]


def sampler(prompt=PROMPT, vocab=V, **values):
    return Sampler(SamplingParams(**values), vocab, EOS, prompt)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


# ------------------------------------------------------------------------------------ processors


@given(rows, st.lists(tokens, max_size=12), processor_settings())
def test_process_is_the_reference(row, generated, params):
    logits = torch.tensor(row)
    got = Sampler(params, V, EOS, PROMPT).process(logits, generated)
    want = sampling_reference.process(row, generated, PROMPT, params, EOS)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-5)
    assert logits.tolist() == row  # never in place


SAID = [7, 7, 9, 0]


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"repetition_penalty": 2.0}, {1, 2, 3, 7, 9, 0}),
        ({"presence_penalty": 1.0}, {7, 9, 0}),
        ({"frequency_penalty": 1.0}, {7, 9, 0}),
        ({"logit_bias": {4: 3.0, 6: -2.0}}, {4, 6}),
        ({"min_tokens": 5, "stop_token_ids": (11,)}, {2, 5, 11}),
        ({"min_tokens": 5, "ignore_eos": True}, {2, 5}),
        ({"min_tokens": 4}, set()),
        ({"temperature": 0.7, "top_k": 3, "top_p": 0.5, "min_p": 0.1}, set()),
    ],
)
def test_each_processor_changes_its_tokens_only(values, changed):
    logits = noise(V)
    got = sampler(**values).process(logits, SAID)
    assert set((got != logits).nonzero().flatten().tolist()) == changed


@pytest.mark.parametrize(("score", "want"), [(3.0, 1.5), (-3.0, -6.0)])
def test_repetition_divides_positive_and_multiplies_negative_scores_once(score, want):
    got = sampler(repetition_penalty=2.0).process(torch.full((V,), score), [3, 3, 3])
    assert got[3] == want


def test_counted_penalties_leave_the_prompt_alone_and_count():
    s = sampler(frequency_penalty=0.5, presence_penalty=0.25)
    got = s.process(torch.zeros(V), [8, 8, 8])
    assert got[8] == -1.75
    assert got[1] == 0


def test_no_setting_means_no_copy():
    logits = noise(V)
    assert sampler().process(logits, [1, 2, 3]) is logits
    assert sampler(temperature=0.5, top_p=0.5).process(logits, []) is logits


def test_process_has_no_memory():
    s = sampler(repetition_penalty=1.5, frequency_penalty=0.4, min_tokens=3)
    logits = noise(V)
    first = s.process(logits, [4])
    s.process(logits, [9, 9, 9])
    assert torch.equal(s.process(logits, [4]), first)


@pytest.mark.parametrize("values", [{}, {"logit_bias": {3: 1.0}}, {"temperature": 1.0}])
@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
def test_broken_scores_are_refused(values, bad):
    logits = torch.full((V,), -math.inf) if bad == "all -inf" else noise(V)
    if bad != "all -inf":
        logits[3] = float(bad)
    with pytest.raises(NumericalError, match="next-token scores"):
        sampler(**values).sample(logits, [])
    good = sampler(**values)
    with pytest.raises(NumericalError):
        sample_batch([good, good], torch.stack([noise(V), logits]), [[], []])


def test_a_nan_on_a_forbidden_token_is_still_seen():
    logits = noise(V)
    logits[2] = math.nan
    with pytest.raises(NumericalError):
        sampler(min_tokens=1).sample(logits, [])


@pytest.mark.parametrize("values", [{"logit_bias": {V: 1.0}}, {"stop_token_ids": (V,)}])
def test_tokens_outside_the_vocabulary_are_refused(values):
    with pytest.raises(ConfigError, match=f"token {V} is not in 0..{V - 1}"):
        sampler(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: -math.inf}},
        {"repetition_penalty": math.inf},
    ],
)
def test_settings_that_cannot_be_computed_with_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        SamplingParams(**values)


# ------------------------------------------------------------------------------------ truncation


@given(noisy, truncation_settings())
def test_probabilities_are_the_reference(row, params):
    got = Sampler(params, V, EOS, PROMPT).probabilities(torch.tensor(row))
    want = torch.tensor(sampling_reference.probabilities(row, params), dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)


@given(rows, st.integers(1, V), st.sampled_from([0.3, 1.0, 2.0]))
def test_top_k_keeps_exactly_k_and_the_lower_ids_of_a_tie(row, k, temperature):
    params = SamplingParams(temperature=temperature, top_k=k)
    got = Sampler(params, V, EOS, PROMPT).probabilities(torch.tensor(row))
    kept = sorted(range(V), key=lambda i: (-row[i], i))[:k]
    assert set(got.nonzero().flatten().tolist()) == set(kept)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.3, 5.0])
def test_top_p_over_a_large_vocabulary(spread):
    # From a peak that 64 tokens cover to a flat row that needs the whole vocabulary.
    size, share = 5000, 0.837
    row = noise(size) * spread
    got = sampler(vocab=size, temperature=1.0, top_p=share).probabilities(row)
    full = row.double().softmax(0)
    kept = full[got > 0]
    assert share <= kept.sum() + 1e-12
    assert kept.sum() - kept.min() < share + 1e-12
    assert kept.min() >= full[got == 0].max()


def test_top_p_stops_as_soon_as_it_is_reached():
    got = sampler(vocab=8, temperature=1.0, top_p=0.5).probabilities(torch.zeros(8))
    assert got.tolist() == [0.25] * 4 + [0.0] * 4


def test_the_order_is_min_p_then_top_k_then_top_p():
    # 0.4 0.3 0.2 0.1: min-p 0.3 drops the last, so top-p 0.75 of the rest (0.444 0.333 0.222)
    # keeps two; top-p first would have kept three.
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    got = sampler(vocab=4, temperature=1.0, min_p=0.3, top_p=0.75).probabilities(row)
    torch.testing.assert_close(got, torch.tensor([4, 3, 0, 0]).double() / 7)
    got = sampler(vocab=4, temperature=1.0, top_k=3, top_p=0.75).probabilities(row)
    torch.testing.assert_close(got, torch.tensor([4, 3, 0, 0]).double() / 7)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature):
    row = noise(V)
    cold = sampler(temperature=temperature).probabilities(row)
    torch.testing.assert_close(cold, sampler().probabilities(row), rtol=0, atol=1e-15)


def test_huge_scores_do_not_overflow():
    row = torch.full((V,), -3e38)
    row[4] = 3e38
    got = sampler(temperature=0.01).probabilities(row)
    assert got[4] == 1
    assert got.sum() == 1


# ---------------------------------------------------------------------------------------- drawing


def chi_square(counts, probabilities, n):
    return sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probabilities) if p)


def test_draws_follow_the_distribution_and_a_wrong_one_is_noticed():
    n, row = 4000, noise(V) / 3
    s = sampler(temperature=0.8, top_k=12, seed=1)
    truth = s.probabilities(row)
    counts = Counter(s.sample(row, [])[0] for _ in range(n))
    # 11 degrees of freedom: a right sampler passes 31 about once in 1000 seeds.
    assert chi_square(counts, truth.tolist(), n) < 31
    assert all(truth[i] > 0 for i in counts)
    for wrong in (sampler(temperature=1.0, top_k=12), sampler(temperature=0.7, top_k=12)):
        assert chi_square(counts, wrong.probabilities(row).tolist(), n) > 31


class Fixed(Sampler):
    """Draws with a given number instead of a random one."""

    value = 0.0

    def uniform(self):
        return self.value


@pytest.mark.parametrize(
    ("value", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (1 - 2**-53, 3)]
)
@pytest.mark.parametrize("scale", [1.0, 1 + 2**-50, 3.0])
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(value, token, scale):
    s = Fixed(SamplingParams(temperature=1.0), V, EOS, PROMPT)
    s.value = value
    assert s.draw(torch.tensor([0, 0.25, 0, 0.75, 0], dtype=torch.float64) * scale) == token


def stream(s, n=30, start=0):
    """``n`` tokens where each step's scores depend on its number only."""
    return [s.sample(noise(V, seed=start + i), [])[0] for i in range(n)]


def test_the_same_seed_gives_the_same_tokens_and_another_does_not():
    one, two, other, fresh = (
        stream(sampler(temperature=2.0, seed=seed)) for seed in (7, 7, 8, None)
    )
    assert one == two
    assert one != other
    assert one != fresh
    assert fresh != stream(sampler(temperature=2.0))


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 1},
        {"top_k": 4, "top_p": 0.3},
        {"min_p": 0.5, "logprobs": 3},
        {"repetition_penalty": 1.3, "logit_bias": {3: 5.0}, "min_tokens": 2},
    ],
)
def test_every_sampled_token_uses_one_random_number(values):
    s = sampler(temperature=1.0, seed=5, **values)
    s.sample(noise(V), [])
    plain = sampler(temperature=1.0, seed=5)
    plain.uniform()
    assert s.uniform() == plain.uniform()


def test_greedy_uses_none():
    s = sampler(seed=5)
    s.sample(noise(V), [])
    assert s.uniform() == sampler(seed=5).uniform()


def test_a_saved_state_continues_the_stream():
    s = sampler(temperature=2.0, seed=3)
    stream(s, 10)
    saved = s.state()
    want = stream(s, 20, start=10)
    other = sampler(temperature=2.0, seed=999)
    other.restore(saved)
    assert stream(other, 20, start=10) == want


def test_greedy_takes_the_lowest_of_equal_ids():
    row = torch.zeros(V)
    row[[4, 9, 20]] = 2.0
    assert sampler().sample(row, [])[0] == 4
    assert sample_batch([sampler()] * 2, torch.stack([row, row]), [[], []]) == [(4, None)] * 2


# ------------------------------------------------------------------------------------------ batch

KINDS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 2},
    {"repetition_penalty": 1.7},
    {"min_tokens": 6, "frequency_penalty": 1.0},
    {"logprobs": 0},
    {"temperature": 1.5, "top_k": 5, "presence_penalty": 1.0},
]


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.integers(0, 1000))
def test_a_batch_gives_what_each_row_gives_alone(kinds, seed):
    def fleet():
        return [sampler(seed=seed + i, **kind) for i, kind in enumerate(kinds)]

    batch, alone = fleet(), fleet()
    said = [[] for _ in kinds]
    for step in range(8):
        logits = (noise(len(kinds), V, seed=step) * 2).round() / 2  # ties
        got = sample_batch(batch, logits, said)
        assert got == [s.sample(r, g) for s, r, g in zip(alone, logits, said, strict=True)]
        for tokens_, (token, _) in zip(said, got, strict=True):
            tokens_.append(token)


def test_a_broken_row_uses_up_nobodys_random_numbers():
    s = sampler(temperature=1.0, seed=1)
    with pytest.raises(NumericalError):
        sample_batch([s, s], torch.stack([noise(V), torch.full((V,), math.nan)]), [[], []])
    assert s.uniform() == sampler(temperature=1.0, seed=1).uniform()


# --------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_before_temperature_and_truncation(count):
    row = noise(V)
    s = sampler(
        temperature=5.0, top_k=9, seed=4, logprobs=count, logit_bias={1: 2.0}, stop_token_ids=(3,)
    )
    token, logs = s.sample(row, [])
    want = s.process(row, []).double().log_softmax(0)
    ranked = sorted(range(V), key=lambda i: (-float(want[i]), i))[:count]
    assert list(logs) == list(dict.fromkeys([*ranked, token]))
    for i, value in logs.items():
        assert value == pytest.approx(float(want[i]), abs=1e-5)


def test_more_logprobs_than_tokens():
    _, logs = sampler(prompt=[], vocab=6, logprobs=20).sample(noise(6), [])
    assert len(logs) == 6
    assert math.fsum(map(math.exp, logs.values())) == pytest.approx(1.0)

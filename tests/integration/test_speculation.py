"""Speculation writes what plain decoding writes, whoever guesses and however well."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import Draft, Drafter
from narrows.draft.combined import Combined
from narrows.draft.smaller import SmallerModel
from narrows.draft.specs import make_drafter
from narrows.engine.engine import Engine
from narrows.engine.sequence import State
from narrows.errors import ConfigError
from tiny import FAMILIES, pair, prompts
from tiny_drafts import offer

SMALL = "residual=32,group=16,value_group=16"
GREEDY = SamplingParams(max_tokens=24)


class Told(Drafter):
    """Guesses from texts it has been told, right with probability ``skill``."""

    name, most = "told", 8

    def __init__(self, texts: dict[tuple[int, ...], list[int]], skill: float) -> None:
        self.texts, self.skill, self.chance = texts, skill, random.Random(1)

    def offer(self, asked):
        return [[offer("told", one.k)] for one in asked]

    def propose(self, asked):
        return [self.guess(one.tokens, one.k) for one in asked]

    def guess(self, tokens, k):
        prompt = next(p for p in self.texts if tuple(tokens[: len(p)]) == p)
        coming = [*self.texts[prompt], *[0] * k][len(tokens) - len(prompt) :][:k]
        return Draft([t if self.chance.random() < self.skill else (t + 1) % 101 for t in coming])


def engine(family: str, spec: str = "dense", drafter: Drafter | None = None, **limits) -> Engine:
    limits.setdefault("cache_bytes", 1 << 28)
    return Engine(pair(family)[0], parse_cache(spec), EngineConfig(**limits), drafter)


def write(machine: Engine, batch: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    requests = [machine.submit(p, s) for p, s in zip(batch, params, strict=True)]
    for _ in machine.run():
        for sequence in machine.scheduler.running:
            assert sequence.caches is not None
            lengths = {cache.length for cache in sequence.caches}
            if sequence.sealed:
                assert lengths == {len(sequence.tokens) - 1}
    return [r.generated for r in requests]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skill", [1.0, 0.5, 0.0])
def test_greedy_text_is_that_of_plain_decoding(family: str, skill: float) -> None:
    batch = prompts(8, seed=1)
    lengths = [3, 24, 9, 17, 1, 24, 12, 5]  # rows end at different times, some inside a draft
    params = [SamplingParams(max_tokens=n) for n in lengths]
    expected = write(engine(family), batch, params)
    whole = write(engine(family), batch, [GREEDY] * 8)
    texts = {tuple(p): t for p, t in zip(batch, whole, strict=True)}
    for size in (1, 2, 5, 8):
        for k in (0, 1, 2, 4, 8):
            machine = engine(family, drafter=Told(texts, skill), draft_tokens=k, prefill_chunk=33)
            got = write(machine, batch[:size], params[:size])
            assert got == expected[:size]


SPECS = ["dense", f"kivi:bits=4,{SMALL}", f"xquant:{SMALL},fold=block,sink=3", f"xquant:{SMALL}"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_cache_compared_with_itself(family: str, spec: str) -> None:
    batch, params = prompts(6, longest=90, seed=4), [SamplingParams(max_tokens=60)] * 6
    expected = write(engine(family, spec), batch, params)
    texts = {tuple(p): t for p, t in zip(batch, expected, strict=True)}
    for skill, k in ((0.6, 4), (0.0, 8), (1.0, 8)):
        machine = engine(family, spec, Told(texts, skill), draft_tokens=k)
        assert write(machine, batch, params) == expected


def test_only_what_is_worth_it_is_asked_for() -> None:
    batch, params = prompts(4, seed=2), [SamplingParams(max_tokens=30)] * 4
    expected = write(engine("llama"), batch, params)
    texts = {tuple(p): t for p, t in zip(batch, expected, strict=True)}
    for skill in (1.0, 0.0):
        drafter, asked = Told(texts, skill), []
        propose = drafter.propose
        drafter.propose = lambda a, propose=propose, asked=asked: asked.extend(a) or propose(a)
        assert write(engine("llama", drafter=drafter), batch, params) == expected
        assert all(one.k > 0 for one in asked)


def test_of_two_drafters_the_better_is_asked() -> None:
    batch, params = prompts(4, seed=2), [SamplingParams(max_tokens=60, ignore_eos=True)] * 4
    expected = write(engine("llama"), batch, params)
    texts = {tuple(p): t for p, t in zip(batch, expected, strict=True)}
    right, wrong, asked = Told(texts, 1.0), Told(texts, 0.0), {"told": 0, "wrong": 0}
    wrong.name = "wrong"
    wrong.offer = lambda a: [[offer("wrong", one.k)] for one in a]
    for one in (right, wrong):

        def count(a, one=one, propose=one.propose):
            asked[one.name] += len(a)
            return propose(a)

        one.propose = count
    machine = engine("llama", drafter=Combined([wrong, right]), draft_tokens=2)
    assert write(machine, batch, params) == expected
    assert 0 < asked["wrong"] < asked["told"] / 2


def test_drafters_that_cannot_be_combined_are_refused() -> None:
    with pytest.raises(ConfigError, match="different"):
        make_drafter("lookup+lookup", pair("llama")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_drafts_for_itself_is_always_right(family: str) -> None:
    batch, params = prompts(5, seed=3), [SamplingParams(max_tokens=n) for n in (40, 9, 25, 3, 40)]
    expected = write(engine(family), batch, params)
    for k in (1, 3, 4):
        drafter = SmallerModel(pair(family)[0], pair(family)[0])
        machine = engine(family, drafter=drafter, draft_tokens=k)
        assert write(machine, batch, params) == expected
        assert machine.speculation.kept == machine.speculation.tried
        assert not drafter._states


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt2"])
def test_another_model_may_draft(family: str) -> None:
    """Its guesses are those it would write itself, whatever became of those before."""
    batch, params = prompts(6, longest=60, seed=5), [SamplingParams(max_tokens=40)] * 6
    expected = write(engine("llama"), batch, params)
    drafter = SmallerModel(pair(family)[0], pair("llama")[0])
    propose, told = drafter.propose, []

    def note(asked):
        drafts = propose(asked)
        told.extend((list(a.tokens), d.tokens) for a, d in zip(asked, drafts, strict=True))
        return drafts

    drafter.propose = note
    assert write(engine("llama", drafter=drafter, draft_tokens=3), batch, params) == expected
    for tokens, guesses in told[:: len(told) // 8]:
        own = write(engine(family), [tokens], [SamplingParams(max_tokens=3, ignore_eos=True)])
        assert own[0][: len(guesses)] == guesses


def test_a_model_with_other_tokens_may_not_draft() -> None:
    with pytest.raises(ConfigError, match="number tokens differently"):
        SmallerModel(pair("llama", vocab_size=90)[0], pair("llama")[0])
    for spec, told in (("model", "name"), ("model:name=x,most=0", "most"), ("model:a=1", "a")):
        with pytest.raises(ConfigError, match=told):
            make_drafter(spec, pair("llama")[0])


def test_lookup_and_the_length_policy_change_no_text() -> None:
    batch = [p * 3 for p in prompts(8, longest=30, seed=6)]
    params = [SamplingParams(max_tokens=40)] * 8
    expected = write(engine("llama"), batch, params)
    machine = engine("llama", drafter=make_drafter("lookup", pair("llama")[0]))
    assert write(machine, batch, params) == expected


@pytest.mark.parametrize("values", [{"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9}])
def test_sampled_text_keeps_its_random_numbers(values: dict[str, float]) -> None:
    batch = prompts(5, seed=8)
    params = [SamplingParams(max_tokens=20, seed=i, **values) for i in range(5)]
    expected = write(engine("qwen3"), batch, params)
    texts = {tuple(p): t for p, t in zip(batch, expected, strict=True)}
    for k in (1, 4):
        assert write(engine("qwen3", drafter=Told(texts, 0.7), draft_tokens=k), batch, params) == (
            expected
        )


def test_a_stop_inside_a_draft_ends_the_text_there() -> None:
    (prompt,) = prompts(1, seed=9)
    (text,) = write(engine("llama"), [prompt], [GREEDY])
    stop = text[6]
    for name in ("stop_token_ids", "ignore"):
        params = SamplingParams(max_tokens=24, stop_token_ids=(stop,) if name != "ignore" else ())
        expected = write(engine("llama"), [prompt], [params])
        machine = engine("llama", drafter=Told({tuple(prompt): text}, 1.0), draft_tokens=8)
        assert write(machine, [prompt], [params]) == expected


def test_preempted_requests_go_on_where_they_stopped() -> None:
    batch, params = prompts(6, longest=60, seed=3), [SamplingParams(max_tokens=40)] * 6
    expected = write(engine("llama"), batch, params)
    texts = {tuple(p): t for p, t in zip(batch, expected, strict=True)}
    one = engine("llama").policy.estimate(pair("llama")[0].shape, 120)
    machine = engine("llama", drafter=Told(texts, 0.7), draft_tokens=3, cache_bytes=2 * one)
    requests = [machine.submit(p, s) for p, s in zip(batch, params, strict=True)]
    for _ in machine.run():
        pass
    assert [r.generated for r in requests] == expected
    assert all(r.state is State.FINISHED for r in requests)


def test_metrics_count_guesses() -> None:
    (prompt,) = prompts(1, seed=5)
    (text,) = write(engine("llama"), [prompt], [SamplingParams(max_tokens=21, ignore_eos=True)])
    machine = engine("llama", drafter=Told({tuple(prompt): text}, 1.0), draft_tokens=4)
    request = machine.submit(prompt, SamplingParams(max_tokens=21, ignore_eos=True))
    written = sum(step.generated_tokens for step in machine.run())
    metrics = request.completion().metrics
    assert written == metrics.generated_tokens == 21
    assert metrics.steps == 5  # the first token, then four times five
    assert metrics.drafted_tokens == metrics.accepted_tokens == 16


def test_a_longer_draft_than_a_sliding_layer_holds_is_refused() -> None:
    drafter = Told({}, 1.0)
    drafter.most = 500
    with pytest.raises(ConfigError, match="500"):
        engine("llama", drafter=drafter)
    assert torch.is_inference_mode_enabled() is False


def test_names_of_drafters_come_before_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lookup").mkdir()
    monkeypatch.chdir(tmp_path)
    target = pair("llama")[0]
    assert make_drafter("auto", target).name == "lookup"
    assert make_drafter("lookup+none", target).name == "lookup"
    assert make_drafter("none+none", target) is None
    with pytest.raises(ConfigError, match="unknown drafter"):
        make_drafter("x" * 300, target)

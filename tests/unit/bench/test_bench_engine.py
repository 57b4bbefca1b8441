import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrows.bench import contestants, engine, limits
from narrows.errors import ConfigError

PROMPTS = [[5, 9, 17, 33, 2], [7, 7, 40], [301, 12, 90, 45, 22, 8, 19]]


def pick(rows, **where):
    return [r for r in rows if all(r.get(k) == v for k, v in where.items())]


@pytest.fixture(scope="module")
def rows(tiny):
    return engine.run(model=tiny, dtypes=["float32"], quick=True, show_progress=False)


def test_rows_hold_every_measure_and_their_origin(rows):
    metrics = {r["metric"] for r in rows}
    assert {"decode_step", "throughput", "first_token", "prefill_speed"} <= metrics
    assert {"roofline_share", "read_bandwidth", "same_text"} <= metrics
    for r in rows:
        assert r["interval"][0] <= r["value"] <= r["interval"][1]
        assert {"unit", "n", "seed", "versions", "command"} <= r.keys()
    json.dumps(rows)


def test_both_engines_write_the_same_text(rows):
    same = pick(rows, metric="same_text")
    assert [r["batch"] for r in same] == [1, 3]
    assert all(r["value"] == 1.0 for r in same)


def test_advantage_is_the_ratio_of_the_two_rows(rows):
    for metric, ours_first in (("decode_step", False), ("throughput", True)):
        ours = pick(rows, metric=metric, batch=3, method="narrows")[0]["value"]
        theirs = pick(rows, metric=metric, batch=3, method="transformers")[0]["value"]
        advantage = pick(rows, metric=f"{metric}_advantage", batch=3)[0]["value"]
        assert advantage == pytest.approx(ours / theirs if ours_first else theirs / ours)


def test_contestants_write_exactly_as_many_tokens_as_asked(tiny):
    ours = contestants.Ours(tiny, "float32", "cpu", "dense").generate(PROMPTS, 6)
    theirs = contestants.Transformers(tiny, "float32", "cpu").generate(PROMPTS, 6)
    assert ours.tokens == theirs.tokens
    assert [len(t) for t in ours.tokens] == [6, 6, 6]
    assert len(ours.steps_s) == len(theirs.steps_s) == 5
    assert 0 < sum(ours.steps_s) < ours.total_s


def test_prompt_lengths_spread_over_the_range(tiny):
    ours = contestants.Ours(tiny, "float32", "cpu", "dense")
    prompts = engine._prompts(ours, 8, 16, 1000, seed=1)
    assert sorted(map(len, prompts))[0] == 16
    assert max(map(len, prompts)) == 1000
    assert prompts == engine._prompts(ours, 8, 16, 1000, seed=1)
    assert [len(p) for p in engine._prompts(ours, 1, 16, 1000, seed=1)] == [508]


def test_curves_are_step_times(rows):
    assert {r["metric"] for r in engine.curves(rows)} == {"decode_step"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtypes": ["int8"]},
        {"dtypes": []},
        {"batches": []},
        {"batches": [0]},
        {"shortest": 9, "longest": 8},
        {"new_tokens": 2},
        {"repeats": 0},
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(wrong):
    with pytest.raises(ConfigError):
        engine.run(model="/nowhere", show_progress=False, **wrong)


def test_tied_weights_are_read_once():
    sizes = {}
    for tied in (True, False):
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
        sizes[tied] = limits.weight_bytes(LlamaForCausalLM(config))
    assert sizes[False] - sizes[True] == 50 * 8 * 4


def test_bandwidth_is_positive():
    assert limits.read_bandwidth(torch.device("cpu"), size=1 << 18, repeats=1) > 0


def test_added_memory_sees_a_big_tensor():
    added = limits.added_memory(lambda: torch.ones(16, 1 << 20).sum(), torch.device("cpu"))
    if added is None:
        pytest.skip("the system cannot reset its peak")
    assert added >= 60 << 20


def test_added_memory_sees_a_tensor_as_big_as_one_freed_before():
    many = [torch.ones(1 << 14) for _ in range(1000)]  # 64 KiB each: kept by the C library
    del many
    again = limits.added_memory(
        lambda: [torch.ones(1 << 14) for _ in range(1000)], torch.device("cpu")
    )
    assert again is None or again > 900 * (1 << 16)


def test_vllm_rows_join_ours(tiny, monkeypatch):
    seen = []

    def fake(model, batches, **options):
        seen.append(([len(b) for b in batches], options))
        return [{"total_s": [2.0], "first_s": [0.5]} for _ in batches]

    monkeypatch.setattr(engine, "time_vllm", fake)
    rows = engine.run(model=tiny, dtypes=["bfloat16"], vllm=True, quick=True, show_progress=False)
    assert seen[0][0] == [1, 3]
    theirs = pick(rows, method="vllm-cpu", batch=3)
    assert {r["metric"]: r["value"] for r in theirs} == {"throughput": 6.0, "decode_step": 500.0}
    advantage = pick(rows, metric="throughput_advantage", versus="vllm-cpu", batch=3)[0]
    ours = pick(rows, metric="throughput", method="narrows", batch=3)[0]
    assert advantage["value"] == pytest.approx(ours["value"] / 6.0)

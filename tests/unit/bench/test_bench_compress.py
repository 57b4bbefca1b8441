import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from narrows.bench import arms, claims, compress, overhead
from narrows.bench.arms import Arm, Budget
from narrows.bench.likelihood import Reader, answer_ids, answer_nll, prompt_ids
from narrows.bench.measure import Measurer, gap_rows, mean_rows
from narrows.bench.prose import read_prose
from narrows.bench.records import Ledger, Record
from narrows.bench.tasks import gsm8k, load
from narrows.compression.units import tokenize
from narrows.contracts import CompressedPrompt
from narrows.errors import BudgetError, ConfigError, InputError
from narrows.llm import LLM


class Ends:
    """A compressor that keeps the first or the last tokens; counts its calls."""

    calls = 0

    def __init__(self, model, side="head", excess=0):
        self.tokenizer = model.tokenizer
        self.side = side
        self.excess = excess

    def compress(self, text, *, target_tokens=None, keep_ratio=None, question=None):
        Ends.calls += 1
        tokens = tokenize(text, self.tokenizer)
        count = target_tokens + self.excess
        spans = tokens.spans[:count] if self.side == "head" else tokens.spans[-count:]
        kept = "".join(text[a:b] for a, b in spans)
        return CompressedPrompt(
            kept, len(spans), len(tokens.ids), tuple(spans), target_tokens, self.side
        )


@pytest.fixture
def fakes(monkeypatch):
    def make(method, model, **options):
        if method not in ("head", "tail"):
            raise ConfigError(f"unknown compression method {method!r}")
        return Ends(model, method, **options)

    monkeypatch.setattr(arms, "make_compressor", make)
    monkeypatch.setattr(overhead, "make_compressor", make)
    monkeypatch.setattr(overhead, "SPECS", ("tail", "head"))
    monkeypatch.setattr(claims, "FUSED", "head")
    monkeypatch.setattr(claims, "SURPRISAL", "tail")
    monkeypatch.setattr(claims, "DYNAMIC", ("head", "tail", "head:excess=0"))
    Ends.calls = 0


@pytest.fixture(scope="module")
def llm(tiny):
    return LLM(tiny, dtype="float32", device="cpu")


def record(item="a", method="head", nll=1.0, **other):
    base = Record(
        model="m",
        dtype="float32",
        seed=0,
        task="t",
        item=item,
        content=item,
        group=item,
        method=method,
        budget="0.5",
        requested=10,
        kept=10,
        context_tokens=20,
        prompt_tokens=15,
        seconds=0.5,
        nll=nll,
        survived=None,
    )
    return replace(base, **other)


def test_answer_nll_is_that_of_the_reference_model(llm, tiny):
    prompt, answer = prompt_ids(llm.model, "the red fox saw"), answer_ids(llm.model, " a blue")
    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + answer])).logits[0]
    rows = log_softmax(logits[len(prompt) - 1 : -1].double(), -1)
    expected = -sum(float(r[t]) for r, t in zip(rows, answer, strict=True)) / len(answer)
    assert answer_nll(llm.model, prompt, answer) == pytest.approx(expected, abs=1e-5)


def test_a_shared_prefix_read_once_changes_no_likelihood(llm):
    reader, first = Reader(llm.model), list(range(3, 40))
    for prompt in (first, [*first[:30], 50, 51], first[:10], [7, 8], first, first):
        for answer in ([4, 5], [4], [9, 10, 11]):
            expected = answer_nll(llm.model, prompt, answer)
            assert reader.answer_nll(prompt, answer) == pytest.approx(expected, abs=1e-5)


def test_answer_nll_refuses_what_it_cannot_read(llm):
    with pytest.raises(InputError, match="not empty"):
        answer_nll(llm.model, [], [1])
    with pytest.raises(InputError, match="takes 2048"):
        answer_nll(llm.model, [1] * 2048, [1])


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("dac", ("dac", {})),
        ("dac:stages=5,alpha=0.5", ("dac", {"stages": 5, "alpha": 0.5})),
        ("x:a=true,b=digits", ("x", {"a": True, "b": "digits"})),
    ],
)
def test_specs_carry_typed_options(spec, parsed):
    assert arms.parse_spec(spec) == parsed


@pytest.mark.parametrize("spec", ["dac:", "dac:stages", "dac:=5", "dac:stages="])
def test_a_malformed_spec_is_refused(spec):
    with pytest.raises(ConfigError, match="option=value"):
        arms.parse_spec(spec)


def test_budgets_in_shares_and_tokens():
    assert Budget(keep=0.33).of(100) == 33
    assert Budget(keep=0.01).of(10) == 1
    assert Budget(tokens=2000).of(50) == 50
    assert Budget(tokens=2000).of(5000) == 2000


def test_an_arm_compresses_a_shared_context_once(fakes, llm, folder):
    items = load("gsm8k", folder)
    assert len({i.context for i in items}) == len(items) == 10
    same = [replace(i, context=items[0].context) for i in items]
    arm = Arm("head", llm.model)
    made = [arm.shorten(i, Budget(keep=0.5)) for i in same]
    assert Ends.calls == 1
    assert len({m.text for m in made}) == 1
    assert made[0].kept == made[0].requested == round(made[0].context_tokens / 2)
    arm.shorten(items[0], Budget(keep=0.25))
    assert Ends.calls == 2


def test_the_ends_keep_all_and_nothing(llm, folder):
    item = load("gsm8k", folder)[0]
    full, none = (Arm(spec, llm.model).shorten(item, Budget()) for spec in ("full", "none"))
    assert (full.text, full.kept) == (item.context, full.context_tokens)
    assert (none.text, none.kept) == ("", 0)


def test_a_method_over_its_budget_stops_the_run(llm, folder, monkeypatch):
    monkeypatch.setattr(arms, "make_compressor", lambda method, model: Ends(model, excess=1))
    with pytest.raises(BudgetError, match="cannot be compared"):
        Arm("greedy", llm.model).shorten(load("gsm8k", folder)[0], Budget(keep=0.5))


def test_a_ledger_takes_up_a_run_that_was_cut_off(tmp_path):
    path = tmp_path / "records.jsonl"
    Ledger(path).add([record("a"), record("b", nll=2.0)])
    whole = path.read_text()
    path.write_text(whole + '{"model": "cut o')
    again = Ledger(path)
    assert again.get(record("b").key) == record("b", nll=2.0)
    again.add([record("c")])
    assert Ledger(path).get(record("c").key) is not None
    assert path.read_text().startswith(whole)
    assert len(path.read_text().splitlines()) == 3


def test_a_ledger_refuses_another_file(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="line 1: not a record"):
        Ledger(path)


def test_mean_rows_average_what_is_known():
    rows = mean_rows([record("a", nll=1.0, survived=True), record("b", nll=3.0)], task="t")
    by = {r["metric"]: r for r in rows}
    assert by["answer_nll"]["value"] == 2.0
    assert by["answer_nll"]["interval"] == [1.0, 3.0]
    assert by["answer_survival"]["n"] == 1
    assert "answer_score" not in by
    assert all(r["budget_met"] for r in rows)
    assert not mean_rows([record(kept=9)])[0]["budget_met"]


def test_gap_rows_pair_items_and_demand_one_budget():
    ours = [record(i, nll=float(n)) for n, i in enumerate("abcd")]
    theirs = [record(i, "tail", nll=n + 0.25) for n, i in enumerate("abcd")]
    (row,) = gap_rows(ours, theirs)
    assert (row["value"], row["interval"], row["versus"]) == (-0.25, [-0.25, -0.25], "tail")
    assert row["metric"] == "answer_nll_difference"
    with pytest.raises(ConfigError, match="same items"):
        gap_rows(ours, theirs[::-1])
    with pytest.raises(ConfigError, match="different budgets"):
        gap_rows(ours, [replace(r, requested=11) for r in theirs])


def test_measuring_twice_measures_once(fakes, llm, folder):
    items = load("needle", folder, limit=3)
    measurer = Measurer(llm, dtype="float32", seed=0, ledger=Ledger())
    arm = Arm("head", llm.model)
    budget = Budget(tokens=50)
    first = measurer.measure(items, arm, budget)
    calls = Ends.calls
    assert measurer.measure(items, Arm("head", llm.model), budget) == first
    assert Ends.calls == calls
    answered = measurer.measure(items, arm, budget, answers=True)
    assert all(r.score is not None and r.prediction is not None for r in answered)
    # Read behind what the prompt before left in the cache, so in other pieces.
    assert [r.nll for r in answered] == pytest.approx([r.nll for r in first], rel=1e-5)


def test_the_same_question_after_other_exemplars_is_another_measurement(fakes, llm, folder):
    measurer = Measurer(llm, dtype="float32", seed=0, ledger=Ledger())
    arm = Arm("head", llm.model)
    for contexts in (1, 3):
        items = gsm8k(folder, contexts=contexts, limit=3)
        records = measurer.measure(items, arm, Budget(keep=0.5))
        assert [r.content for r in records] == [i.digest for i in items]
        assert len({r.group for r in records}) == contexts


def test_survival_follows_the_kept_part(fakes, llm, folder):
    items = load("needle", folder, limit=10)
    measurer = Measurer(llm, dtype="float32", seed=0, ledger=Ledger())
    head = measurer.measure(items, Arm("head", llm.model), Budget(tokens=600))
    tail = measurer.measure(items, Arm("tail", llm.model), Budget(tokens=600))
    assert (head[0].survived, tail[0].survived) == (True, False)
    assert (head[9].survived, tail[9].survived) == (False, True)


OPTIONS = {"dtype": "float32", "device": "cpu", "show_progress": False}


def test_a_quick_run_gives_rows_of_every_part(fakes, tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "TOKENS", 300)
    monkeypatch.setattr(overhead, "LONG_TOKENS", 400)
    monkeypatch.setattr(claims, "PASSAGE", 60)
    rows = compress.run(
        model=tiny,
        data=folder,
        parts=compress.PARTS,
        tasks=["gsm8k", "longbench", "needle"],
        methods=["head", "tail"],
        token_budget=200,
        records=tmp_path / "records.jsonl",
        quick=True,
        **OPTIONS,
    )
    parts = {r.get("part") for r in rows}
    assert {None, "time", "R1", "R2", "R3", "R4", "R5"} <= parts
    metrics = {r["metric"] for r in rows}
    assert {"answer_nll", "answer_score", "answer_survival", "answer_nll_difference"} <= metrics
    assert {"full", "none", "head", "tail"} <= {r["method"] for r in rows if "suite" in r}
    budgets = {r["budget"] for r in rows if r.get("suite") == "needle"}
    assert "200 tokens" in budgets
    for r in rows:
        assert {"unit", "interval", "n", "seed", "versions", "command", "model"} <= r.keys()
        assert math.isfinite(r["value"])
    gap = next(r for r in rows if r["metric"] == "answer_nll_difference" and "suite" in r)
    assert gap["kept_tokens"] == gap["kept_tokens_versus"]
    assert compress.summary(rows)
    assert {r["metric"] for r in compress.curves(rows)} == {"answer_nll"}
    json.dumps(rows)


def test_an_interrupted_run_gives_the_same_rows(fakes, tiny, folder, tmp_path):
    options = {"model": tiny, "data": folder, "parts": ["likelihood"], "tasks": ["gsm8k"]}
    options |= {"methods": ["head", "tail"], "keep": [0.5], "limit": 4, **OPTIONS}
    path = tmp_path / "records.jsonl"

    def values(rows):
        timed = "compress_time"
        return [(r["metric"], r["value"], r["interval"]) for r in rows if r["metric"] != timed]

    whole = values(compress.run(**options, records=path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))
    assert values(compress.run(**options, records=path)) == whole
    assert values(compress.run(**options)) == whole


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ["speed"]}, "unknown part 'speed'"),
        ({"methods": []}, "at least one method"),
        ({"keep": [1.5]}, "between 0 and 1"),
        ({"token_budget": 0}, "token_budget"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(wrong, message):
    with pytest.raises(ConfigError, match=message):
        compress.run(model="/nowhere", **wrong)


def test_an_unknown_method_is_refused_before_work(fakes, tiny, folder):
    with pytest.raises(ConfigError, match="unknown compression method"):
        compress.run(model=tiny, data=folder, methods=["head", "hed"], tasks=["gsm8k"], **OPTIONS)


def test_prose_has_exactly_the_tokens_asked_for(llm, folder):
    text = read_prose(folder, llm.model, 500)
    assert abs(len(text.ids) - 500) <= 1
    with pytest.raises(InputError, match="fewer than"):
        read_prose(folder, llm.model, 10**6)


def test_rounds_run_every_job_and_drop_the_first():
    calls = []

    def job(name):
        calls.append(name)
        return float(len(calls))

    taken = overhead.interleave({"a": lambda: job("a"), "b": lambda: job("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert taken == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert overhead.timed(lambda: None)() >= 0.0


def test_correlations_against_numpy():
    chance = np.random.default_rng(0)
    a, b = chance.normal(size=(2, 50))
    assert claims.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert claims.spearman(a, a**3) == pytest.approx(1.0)
    assert claims.pearson(a, np.ones(50)) == 0.0


def test_deletion_orders_spare_the_first_token_and_follow_their_score():
    from narrows.compression.score import TokenScores

    scores = TokenScores(np.array([0.0, 3, 1, 2]), np.array([9.0, 1, 5, 2]), [(0, 4)])
    rules = claims._rules(seed=0)
    assert rules["most attended"](scores, 0).tolist() == [2, 3, 1]
    assert rules["least surprising"](scores, 0).tolist() == [2, 3, 1]
    assert sorted(rules["random"](scores, 0).tolist()) == [1, 2, 3]
    assert claims._without([5, 6, 7, 8], np.array([2, 3, 1]), 0.5) == [5, 6]


def test_every_default_method_runs_on_a_tiny_model(tiny, folder, monkeypatch):
    monkeypatch.setattr(overhead, "TOKENS", 300)
    monkeypatch.setattr(overhead, "LONG_TOKENS", 400)
    rows = compress.run(
        model=tiny,
        data=folder,
        parts=["likelihood", "time", "claims"],
        tasks=["gsm8k"],
        quick=True,
        **OPTIONS,
    )
    kept = {r["method"]: r for r in rows if r["metric"] == "kept_tokens" and r["budget"] == "0.5"}
    assert set(compress.METHODS) <= kept.keys()
    exact = kept["dac"]["value"]
    assert {kept[m]["value"] for m in compress.METHODS if m not in UNITS} == {exact}
    timed = {r["method"] for r in rows if r["metric"] == "time_ratio"}
    assert timed == set(overhead.SPECS)


UNITS = {"extractive"}
"""Methods that keep sentences, and so may fall short of a budget."""

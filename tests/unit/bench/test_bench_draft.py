"""The drafting benchmark runs whole and tells what it promises."""

import json

import pytest

from narrows.bench import draft
from narrows.config import EngineConfig
from narrows.errors import ConfigError, InputError
from narrows.llm import LLM

METRICS = {
    "speed",
    "step",
    "speed_up",
    "speed_up_overall",
    "kappa",
    "drafted",
    "drafting",
    "kept_1",
}


@pytest.fixture
def questions(folder):
    rows = [{"question_id": i, "turns": [f"the red fox saw {i} apples in Rome"]} for i in range(16)]
    path = folder / "spec_bench/question.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def chatty(tiny, monkeypatch):
    monkeypatch.setattr(
        "narrows.llm.LLM.chat_ids", lambda self, messages: self.encode(messages[0]["content"])
    )
    return tiny


def test_rows_of_every_metric(chatty, questions):
    rows = draft.run(
        model=chatty,
        data=questions,
        drafters=("lookup:shortest=1",),
        batches=(2, 3),
        new_tokens=12,
        rounds=1,
        dtype="float32",
        show_progress=False,
    )
    told = {(r["method"], r["batch"], r["metric"]): r for r in rows}
    for batch in (2, 3):
        assert {m for spec, b, m in told if spec != "none" and b == batch} >= METRICS
        assert told["lookup:shortest=1", batch, "kappa"]["value"] >= 1.0
        assert ("none", batch, "speed") in told
    assert {r["metric"] for r in draft.curves(rows)} == {"speed_up"}
    assert all(not r["metric"].startswith("kept") for r in draft.summary(rows))


def test_a_combination_is_compared_with_its_parts_too(chatty, questions):
    rows = draft.run(
        model=chatty,
        data=questions,
        drafters=("lookup", f"lookup+model:name={chatty}"),
        batches=(2,),
        new_tokens=8,
        rounds=3,
        dtype="float32",
        show_progress=False,
    )
    both = f"lookup+model:name={chatty}"
    for metric in ("mean_speed_up", "mean_speed_up_overall"):
        told = [r for r in rows if r["metric"] == metric]
        pairs = [(r["method"], r["versus"]) for r in told]
        assert pairs == [("lookup", "none"), (both, "none"), (both, "lookup")]
        assert all(r["interval"][0] <= r["value"] <= r["interval"][1] for r in told)
        assert all(r["n"] == 3 for r in told)
    assert [r["metric"] for r in draft.curves(rows)] == ["speed_up"] * 2


def test_every_round_answers_other_prompts(chatty, questions, monkeypatch):
    answered = []
    real = draft._abreast
    monkeypatch.setattr(draft, "_abreast", lambda w, p, *t: answered.append(p) or real(w, p, *t))
    sizes = {"batches": (2,), "requests": 2, "rounds": 3, "new_tokens": 8, "dtype": "float32"}
    draft.run(model=chatty, data=questions, show_progress=False, **sizes)
    sets = [frozenset(map(tuple, prompts)) for prompts in answered]
    assert len(sets) == 2 * 4  # written and told; three rounds and the one before them
    assert len(set(sets)) == 4
    assert len(frozenset.union(*sets)) == 16


@pytest.fixture
def writers(chatty):
    """Of plain decoding and lookup, which verifies all guesses, since steps of a tiny model are too
    short to choose by; two texts of 12 tokens at a time; and five prompts."""
    llm = LLM(chatty, dtype="float32", draft="none")
    prompts = [llm.encode(f"the red fox saw {i} apples in Rome") for i in range(5)]
    specs = ("none", "lookup:shortest=1")
    limits = EngineConfig(draft_tokens=8, max_sequences=2)
    return {spec: draft._Writer(llm, spec, "dense", limits, 12) for spec in specs}, prompts


def test_all_write_what_plain_decoding_wrote(writers):
    both, prompts = writers
    plain, free = draft._abreast(both, prompts).values()
    assert free.texts == plain.texts
    assert plain.kappa == 1.0
    for texts in (free.texts, [[1, 2] * 6 for _ in prompts]):
        plain, told = draft._abreast(both, prompts, texts).values()
        assert plain.texts == told.texts == texts
    assert told.kappa > 1.5  # such texts are easily guessed


def test_the_furthest_behind_takes_the_next_step(writers, monkeypatch):
    both, prompts = writers
    ahead = []
    real = draft._Writer.step

    def step(self):
        (other,) = {*both.values()} - {self}
        if other.busy:
            ahead.append(self.passed - other.passed)
        real(self)

    monkeypatch.setattr(draft._Writer, "step", step)
    draft._abreast(both, prompts)
    assert len(ahead) > 20
    assert max(ahead) <= 0


def test_only_prompts_read_in_large_enough_chunks_are_decoded_together(chatty):
    llm = LLM(chatty, dtype="float32", draft="none")
    prompts = [llm.encode(f"the red fox saw {i} apples in Rome " * 3) for i in range(2)]
    longest = max(map(len, prompts))

    def made(chunk):
        limits = EngineConfig(max_sequences=2, prefill_chunk=chunk)
        writer = draft._Writer(llm, "none", "dense", limits, 4)
        return draft._abreast({"none": writer}, prompts)["none"]

    assert made(2 * longest).step_ms > 0
    with pytest.raises(ConfigError, match="larger prefill_chunk"):
        made(2)  # the first text is written before the second prompt is read


def test_peers_are_measured_at_batch_one(chatty, questions):
    rows = draft.run(
        model=chatty,
        data=questions,
        batches=(1, 2),
        new_tokens=12,
        rounds=2,
        peers=True,
        dtype="float32",
        device="cpu",
        show_progress=False,
    )
    told = {(r["method"], r["batch"], r["metric"]): r for r in rows}
    assert told["transformers lookup", 1, "speed_up"]["versus"] == "transformers"
    assert told["transformers lookup", 1, "same_text"]["value"] == 1.0
    assert told["transformers lookup", 1, "kappa"]["value"] >= 1.0
    assert ("transformers", 1, "speed") in told
    assert ("transformers", 2, "speed") not in told


def test_bad_input_is_refused(chatty, questions):
    with pytest.raises(ConfigError, match="unknown drafter"):
        draft.run(model=chatty, data=questions, drafters=("nothing-like-it",), show_progress=False)
    with pytest.raises(ConfigError, match="new_tokens"):
        draft.run(model=chatty, data=questions, new_tokens=1, show_progress=False)
    with pytest.raises(InputError, match="only 16 questions"):
        draft.run(model=chatty, data=questions, batches=(9,), show_progress=False)

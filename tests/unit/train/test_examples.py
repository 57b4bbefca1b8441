"""Answers to learn from: greedy, kept part by part, refused when they are another run's."""

from __future__ import annotations

import pytest

from narrows.cache.dense import DensePolicy
from narrows.config import EngineConfig, SamplingParams
from narrows.engine.engine import Engine
from narrows.errors import InputError, ModelError
from narrows.train import examples as module
from narrows.train.examples import answer_all, given_all
from tiny import pair


class TinyLLM:
    """What ``answer_all`` uses of an LLM, with letters for tokens."""

    def __init__(self) -> None:
        self.model = pair("llama")[0]
        self.engine = Engine(self.model, DensePolicy(), EngineConfig(cache_bytes=1 << 26))
        self.asked = 0

    def chat_ids(self, messages):
        return [3 + ord(c) % 90 for c in messages[0]["content"]]

    def encode(self, text):
        return self.chat_ids([{"content": text}])

    def submit(self, ids, params):
        self.asked += 1
        return self.engine.submit(ids, params.model_copy(update={"ignore_eos": True}))


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(module, "PART", 2)


def test_answers_are_those_of_the_model_and_are_not_made_twice(tmp_path, parts):
    llm, prompts = TinyLLM(), ["one", "two", "three"]
    made = answer_all(llm, prompts, tmp_path, max_tokens=7)
    assert len(made) == 3
    for prompt, example in zip(prompts, made, strict=True):
        ids = llm.chat_ids([{"content": prompt}])
        request = llm.submit(ids, SamplingParams(max_tokens=7))
        for _ in llm.engine.run():
            pass
        assert example.tokens == [*ids, *request.generated]
        assert example.start == len(ids)
    before = llm.asked
    (tmp_path / "part-00001.safetensors").unlink()
    assert answer_all(llm, prompts, tmp_path, max_tokens=7) == made
    assert llm.asked == before + 1  # of the part that was missing


def test_prompts_without_room_are_left_out(tmp_path):
    made = answer_all(TinyLLM(), ["a" * 50, "short"], tmp_path, max_tokens=9, longest=20)
    assert [e.start for e in made] == [5]
    with pytest.raises(InputError, match="short enough"):
        answer_all(TinyLLM(), ["a" * 50], tmp_path / "b", longest=20)


def test_other_answers_and_damaged_ones_are_refused(tmp_path):
    answer_all(TinyLLM(), ["one", "two"], tmp_path, max_tokens=7)
    with pytest.raises(InputError, match="other texts"):
        answer_all(TinyLLM(), ["one", "three"], tmp_path, max_tokens=7)
    path = tmp_path / "part-00000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="damaged"):
        answer_all(TinyLLM(), ["one", "two"], tmp_path, max_tokens=7)


def test_answers_that_were_given_are_taken_as_they_are():
    llm = TinyLLM()
    made = given_all(llm, ["one", "two", "three"], ["first", "ab", "c" * 50], longest=20)
    assert len(made) == 1  # nothing can be learnt from the second, and the third is too long
    assert made[0].start == 3
    end = min(llm.model.eos_ids)
    assert made[0].tokens == [*llm.encode("one"), *llm.encode("first"), end]
    with pytest.raises(InputError, match="short enough"):
        given_all(llm, ["one"], ["c" * 50], longest=20)
    assert not llm.asked

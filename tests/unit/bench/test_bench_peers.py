"""Rivals in environments of their own: the programs they run, with stand-ins for the packages."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from narrows.bench import overhead, peers
from narrows.bench.cache_kvpress import KVPress, parse_kvpress
from narrows.bench.cache_subjects import Ours
from narrows.errors import ConfigError, ModelError
from narrows.model.flat import FlatModel

PROMPTS = [[5, 9, 17, 33, 2], [7, 7, 40], [301, 12, 90, 45, 22, 8, 19]]

FAKE_VLLM = """
    class SamplingParams:
        def __init__(self, **options):
            self.options = options

    class LLM:
        def __init__(self, **options):
            if options["model"].endswith("broken"):
                raise RuntimeError("no such architecture")
            assert options["enable_prefix_caching"] is False

        def generate(self, prompts, params, use_tqdm):
            assert params.options["ignore_eos"] and params.options["max_tokens"] in (1, 2, 4)
            assert all(isinstance(p["prompt_token_ids"], list) for p in prompts)
"""

FAKE_LLMLINGUA = """
    import json, pathlib, tiktoken

    class PromptCompressor:
        def __init__(self, folder, device_map, model_config):
            self.config = json.loads(pathlib.Path(folder, "config.json").read_text())
            assert pathlib.Path(folder, "model.safetensors").exists()
            words = json.loads(pathlib.Path(folder, "tokenizer_config.json").read_text())
            assert words["tokenizer_class"] == "PreTrainedTokenizerFast"

        def compress_prompt(self, passages, target_token):
            assert self.config["rope_theta"] == 5e5
            count = tiktoken.encoding_for_model("any").encode(passages[0])
            return {"compressed_tokens": target_token + len(count)}
"""


@pytest.fixture
def fake_python(tmp_path):
    (tmp_path / "vllm.py").write_text(textwrap.dedent(FAKE_VLLM))
    (tmp_path / "llmlingua.py").write_text(textwrap.dedent(FAKE_LLMLINGUA))
    (tmp_path / "tiktoken.py").write_text("")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_vllm_job_gives_seconds_of_every_round(tmp_path, fake_python):
    options = {"dtype": "bfloat16", "new_tokens": 4, "repeats": 2, "max_tokens": 16}
    batches = peers.time_vllm(tmp_path, [PROMPTS, PROMPTS[:1]], python=fake_python, **options)
    assert [len(b["total_s"]) for b in batches] == [2, 2]
    assert [len(b["first_s"]) for b in batches] == [2, 2]


def test_a_failing_vllm_is_one_clear_line(tmp_path, fake_python):
    options = {"dtype": "bfloat16", "new_tokens": 4, "repeats": 1, "max_tokens": 16}
    with pytest.raises(ModelError, match=r"vLLM could not run the model: .*no such architecture"):
        peers.time_vllm(tmp_path / "broken", [PROMPTS], python=fake_python, **options)


@pytest.fixture
def rotated(tiny, tmp_path):
    """The tiny model with a rotary base of its own, as transformers 5 writes one down."""
    folder = tmp_path / "rotated"
    folder.mkdir()
    for file in Path(tiny).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads(Path(tiny, "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_llmlingua_gets_the_model_in_the_words_of_its_transformers(rotated, fake_python):
    seconds, kept = peers.time_llmlingua(
        rotated, ["one two", "three"], 7, dtype="float32", python=fake_python
    )
    assert seconds > 0
    assert kept > 7  # its tokens are counted in the model's own vocabulary


def test_a_rotary_type_that_cannot_be_translated_is_refused(rotated, fake_python):
    config = json.loads((rotated / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    (rotated / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"LLMLingua could not run.*yarn is not translated"):
        peers.time_llmlingua(rotated, ["one"], 7, dtype="float32", python=fake_python)


def test_the_released_package_is_timed_within_the_rounds(tiny, monkeypatch):
    calls = []

    def fake(folder, passages, target, dtype):
        calls.append((folder, "".join(passages), target, dtype))
        return 2.0, target + 1

    monkeypatch.setattr(overhead, "time_llmlingua", fake)
    kept = []
    job = overhead._released(tiny, "A text.\n\nIn two parts.", 5, "float32", kept)
    assert job() == 2.0
    assert kept == [6]
    assert calls == [(tiny, "A text.\n\nIn two parts.", 5, "float32")]


def test_an_environment_is_made_once_and_remade_if_cut_off(tmp_path, monkeypatch):
    made, ran = [], []

    def create(folder, with_pip):
        made.append(folder)
        assert not folder.exists()
        folder.mkdir()

    monkeypatch.setattr(peers.venv, "create", create)
    monkeypatch.setattr(peers.Rival, "_pip", lambda self, python, *words: ran.append(words))
    assert peers.VLLM.environment(tmp_path) == peers.VLLM.environment(tmp_path)
    assert len(made) == 1
    assert [w[0] for w in ran] == ["install", "uninstall"]
    assert peers.LLMLINGUA.environment(tmp_path) != peers.VLLM.environment(tmp_path)
    assert [w[0] for w in ran] == ["install", "uninstall", "install"]

    def fail(self, python, *words):
        raise ConfigError("no network")

    other = tmp_path / "other"
    monkeypatch.setattr(peers.Rival, "_pip", fail)
    for _ in range(2):
        with pytest.raises(ConfigError, match="no network"):
            peers.VLLM.environment(other)
    assert len(made) == 4


FAKE_KVPRESS = """
    from contextlib import nullcontext

    class SnapKVPress:
        def __init__(self, compression_ratio, **options):
            assert options == {"window_size": 64, "kernel_size": 5}
            self.ratio = compression_ratio

        def __call__(self, model):
            return nullcontext()
"""


@pytest.fixture
def session(tiny, tmp_path, fake_python):
    (tmp_path / "kvpress.py").write_text(textwrap.dedent(FAKE_KVPRESS))
    return peers.KVPRESS.open({"model": tiny, "dtype": "float32"}, fake_python)


def test_kvpress_is_asked_step_by_step(session, tiny):
    """With a press that drops nothing it is the model's own dense cache."""
    peer = KVPress(session, "kvpress-snapkv@0.5", 32.0)
    ours = Ours(FlatModel.load(tiny, dtype="float32", device="cpu"), "dense")
    prompts = [[5, 9, 17, 33, 2], [7, 40, 8]]
    readers = [peer.read(p) for p in prompts]
    same = [ours.read(p) for p in prompts]
    held = peer.held(readers[0])
    for tokens in ([3, 4], [11, 12]):
        torch.testing.assert_close(
            peer.step(readers, tokens), ours.step(same, tokens), rtol=1e-3, atol=1e-4
        )
    assert peer.held(readers[0]) > held > 0
    number = readers[0].number
    del readers
    with pytest.raises(ModelError, match=r"kvpress could not run the model: KeyError"):
        session.ask({"step": [[number, 3]], "file": "unused"})
    with pytest.raises(ModelError):  # and says so again
        session.ask({"read": [1], "press": "snapkv", "ratio": 0.5})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kvpress-magic@0.5", "unknown peer"),
        ("kvpress-snapkv", "give the share kept"),
        ("kvpress-snapkv@2", "give the share kept"),
        ("kvpress-snapkv@x", "give the share kept"),
    ],
)
def test_bad_kvpress_names_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_kvpress(name)
    assert parse_kvpress("quanto4") is None
    assert parse_kvpress("kvpress-tova@0.25") == ("tova", 0.25)

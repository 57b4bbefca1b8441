"""Recordings on the command line, heard by a backend without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from narrows.retrieve.audio import RATE
from tiny_ear import instead_of_models, talk
from tiny_sound import write_wav

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _ears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_models(monkeypatch, tmp_path / "cache")


@pytest.fixture
def talk_file(tmp_path: Path) -> str:
    wave = np.concatenate([np.zeros(70 * RATE, np.float32), talk("harbour", "bridge", "bread")])
    return str(write_wav(tmp_path / "a [b].wav", wave))


@pytest.fixture
def silent_file(tmp_path: Path) -> str:
    return str(write_wav(tmp_path / "silent.wav", np.zeros(3 * RATE, np.float32)))


def test_index_then_search(run: Run, talk_file: str, silent_file: str, tmp_path: Path) -> None:
    out = str(tmp_path / "talks")
    code, said, told = run("listen", "index", talk_file, silent_file, "-o", out)
    assert (code, said) == (0, "")
    assert "2 recordings, 1:23 of sound, 3 clips" in told
    assert "no speech found in" in told
    code, said, _ = run("listen", "search", out, "Where is the bridge?", "-k", "1")
    assert code == 0
    assert "a [b].wav" in said
    assert "1:13-1:14" in said
    assert "the bridge" in said
    assert "bread" not in said
    code, said, _ = run("listen", "search", out, "Where is the bridge?", "-k", "2", "--json")
    row = json.loads(said)
    assert row["question"] == "Where is the bridge?"
    assert row["hits"][0]["text"] == "the bridge"
    assert row["hits"][0]["name"] == talk_file
    assert row["hits"][0]["start"] == pytest.approx(73.5, abs=0.3)
    code, said, told = run("listen", "search", out, "zebra", "--mode", "words")
    assert (code, said) == (0, "")
    assert "nothing found" in told


def test_ask_answers_from_a_recording_and_says_where(run: Run, talk_file: str) -> None:
    options = ("ask", "--audio", talk_file, "-n", "4")
    code, out, _ = run(*options, "--json", "Where is the bridge?")
    assert code == 0
    answer = json.loads(out)
    sources = {source["document"]: source["score"] for source in answer["sources"]}
    assert max(sources, key=lambda name: sources[name]) == "a [b].wav 1:13-1:14"
    assert list(sources) == sorted(sources)
    assert "listen" in answer["savings"]["seconds"]
    _, _, told = run(*options, "Where is the bridge?")
    assert "from a [b].wav 1:13-1:14, " in told.replace("\n", " ")


def test_ask_takes_recordings_and_documents_together(
    run: Run, talk_file: str, silent_file: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("The bridge is by the mill.")
    documents = ("--doc", str(tmp_path / "notes.txt"), "--json", "-n", "2", "Where is the bridge?")
    _, out, _ = run("ask", "--audio", talk_file, *documents)
    names = [source["document"] for source in json.loads(out)["sources"]]
    assert len(names) == 4
    assert names[0].endswith("notes.txt")
    _, out, _ = run("ask", "--audio", silent_file, *documents)
    assert len(json.loads(out)["sources"]) == 1


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["listen", "index", "missing.wav", "-o", "OUT"], "missing.wav cannot be read"),
        (["listen", "index", "TEXT", "-o", "OUT"], "is no sound"),
        (["listen", "index", "TALK", "-o", "TEXT"], "cannot make the index"),
        (["listen", "index", "TALK", "-o", "OUT", "--backend", "x"], "known: transcript"),
        (["listen", "index", "TALK", "-o", "OUT", "--window", "99"], "a window must be"),
        (["listen", "search", "OUT", "why"], "there is no speech index"),
        (["listen", "search", "INDEX", " "], "question is empty"),
        (["listen", "search", "INDEX", "why", "-k", "0"], "at least 1"),
        (["listen", "search", "INDEX", "why", "--mode", "x"], "known: fused"),
        (["ask", "why", "--audio", "missing.wav"], "missing.wav"),
        (["ask", "why", "--audio", "TEXT"], "is no sound"),
        (["ask", "why", "--audio", "SILENT"], "no speech found"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run: Run,
    talk_file: str,
    silent_file: str,
    tmp_path: Path,
    arguments: list[str],
    hint: str,
) -> None:
    text = tmp_path / "text.mp3"
    text.write_text("Call me Ishmael.")
    index = str(tmp_path / "index")
    run("listen", "index", talk_file, "-o", index)
    named = {"TALK": talk_file, "SILENT": silent_file, "TEXT": str(text), "INDEX": index}
    named["OUT"] = str(tmp_path / "out")
    code, out, err = run(*(named.get(a, a) for a in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("narrows: error: ")
    assert err.count("\n") == 1
    assert hint in err

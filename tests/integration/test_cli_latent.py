"""convert, train and export on the command line, from a folder to an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_latent import base
from tiny_text import PROSE, VOCABULARY, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, and some text beside it."""
    place = tmp_path_factory.mktemp("models")
    base("llama", vocab_size=VOCABULARY).save_pretrained(place / "base")
    tokenizer().save_pretrained(place / "base")
    (place / "text.txt").write_text(PROSE * 20)
    return place


SIZES = ["--qk", "16", "--vo", "8"]


def test_convert_heal_and_write(program, folder: Path) -> None:
    model, text = str(folder / "base"), str(folder / "text.txt")
    small = ["--text", text, "--windows", "4", "--window", "32", "--dtype", "float32"]
    code, out, err = program(
        "convert", "kv-latent", model, *SIZES, "--out", str(folder / "half"), *small
    )
    assert code == 0, err
    assert "(37.5 %)" in out
    assert out.count("\n") == 1
    told = json.loads((folder / "half" / "config.json").read_text())["kv_latent"]
    assert told["base"] == model
    assert told["trained_tokens"] == 0
    short = ["--tokens", "2000", "--window", "32", "--layer-steps", "2", "--steps", "2"]
    code, out, err = program(
        *("train", "kv-latent", str(folder / "half"), "--out", str(folder / "healed")),
        *("--text", text, "--dtype", "float32", *short),
    )
    assert code == 0, err
    assert (folder / "healed" / "curves.png").is_file()
    told = json.loads((folder / "healed" / "config.json").read_text())["kv_latent"]
    assert told["trained_tokens"] == 4 * 4 * 32
    code, out, err = program("generate", "the ship", "--model", str(folder / "healed"), "-n", "4")
    assert code == 0, err
    code, out, err = program(
        "export", "stock", str(folder / "healed"), "--out", str(folder / "stock")
    )
    assert code == 2
    assert "16 numbers a head and values 8" in err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--qk", "17", "--vo", "8"], "must be even"),
        (["--qk", "64", "--vo", "8"], "have 32 numbers"),
        ([*SIZES, "--preset", "best"], "not one of tuned, paper"),
        ([*SIZES, "--text", "nowhere.txt"], "neither own, nor data"),
        ([*SIZES, "--out", "here"], "exists already"),
    ],
)
def test_bad_conversions_leave_nothing(
    program, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("mine")
    place = [] if "--out" in args else ["--out", "out"]
    code, _, err = program("convert", "kv-latent", str(folder / "base"), *args, *place)
    assert code == 2
    assert told in err
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_what_is_not_converted_is_not_healed(program, folder: Path, tmp_path: Path) -> None:
    code, _, err = program(
        "train", "kv-latent", str(folder / "base"), "--out", str(tmp_path / "out")
    )
    assert code == 2
    assert "not a converted model" in err
    code, _, err = program("export", "stock", str(folder / "base"), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "not converted" in err
    assert not list(tmp_path.iterdir())

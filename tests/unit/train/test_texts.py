"""Running text as windows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from narrows.cache.dense import DensePolicy
from narrows.config import EngineConfig
from narrows.engine.engine import Engine
from narrows.errors import InputError, ModelError
from narrows.train import texts
from tiny_text import chat_model, tokenizer

WORDS = "the ship sailed on and the wind was fair "


def write(path: Path, count: int = 60) -> Path:
    path.write_text(WORDS * count)
    return path


def test_windows_are_cut_from_all_texts_and_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "b.md")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": WORDS * 30}) + "\n")
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    found = list(texts.from_path(tmp_path))
    assert sorted(map(len, found)) == [len(WORDS) * 30, len(WORDS) * 60, len(WORDS) * 60]
    made = texts.windows(found, tokenizer(), 16, 1000)
    ids = tokenizer()(WORDS * 150, add_special_tokens=False)["input_ids"]
    assert len(ids) // 16 <= len(made) <= (len(ids) + 12) // 16
    assert all(len(window) == 16 for window in made)
    assert made == texts.windows(found, tokenizer(), 16, 1000)
    assert made != texts.windows(found, tokenizer(), 16, 1000, seed=1)
    assert texts.digest(made) != texts.digest(made[1:])
    assert len(texts.windows(found, tokenizer(), 16, 3)) == 3


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no text"):
        list(texts.from_path(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(InputError, match="row 1: no field text"):
        list(texts.from_path(tmp_path / "a.jsonl"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot read"):
        list(texts.from_path(tmp_path / "b.txt"))
    with pytest.raises(InputError, match="tokens, not the 500 of a window"):
        texts.windows(["too short"], tokenizer(), 500, 10)


def test_a_model_writes_its_own_text() -> None:
    model = chat_model()
    engine = Engine(model, DensePolicy(), EngineConfig(cache_bytes=1 << 28))
    llm = SimpleNamespace(model=model, engine=engine, submit=engine.submit)
    made = texts.gather("own", llm, 12, 3)
    assert [len(window) for window in made] == [12, 12, 12]
    assert len({tuple(window) for window in made}) == 3
    assert made == texts.gather("own", llm, 12, 3)
    with pytest.raises(InputError, match="neither own, nor data, nor a file"):
        texts.gather("nowhere", llm, 12, 3)
    with pytest.raises(InputError, match="exceed"):
        texts.gather("own", llm, 100_000, 3)


def test_windows_are_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "work" / "text.safetensors"
    made = texts.kept(file, "this", lambda: [[1, 2], [3, 4]])
    assert texts.kept(file, "this", lambda: [[5, 6]]) == made == [[1, 2], [3, 4]]
    with pytest.raises(InputError, match="other text"):
        texts.kept(file, "that", lambda: [[5, 6]])
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ModelError, match="damaged"):
        texts.kept(file, "this", lambda: [[5, 6]])


@pytest.mark.data
def test_the_data_folder_has_text_for_training(data_folder: Path) -> None:
    assert sum(len(text) for text in texts.from_data(data_folder)) > 3_000_000

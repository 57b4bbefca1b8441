import builtins
import io
import json
import re

import pytest
from rich.console import Console

from narrows.bench import provenance, report
from narrows.errors import ConfigError, InputError


def one(value=1.5, **where):
    return report.row(
        "compress",
        method="dac",
        model="tiny",
        metric="answer_nll",
        unit="nats/token",
        value=value,
        interval=(1.0, 2.0),
        n=7,
        **where,
    )


def test_a_row_says_what_when_and_where():
    rows = report.with_provenance([one(task="gsm8k")], provenance.provenance(seed=5))
    needed = {"method", "model", "metric", "unit", "value", "interval", "n", "seed", "versions"}
    assert needed | {"command", "commit", "machine", "spread"} <= rows[0].keys()
    assert rows[0]["seed"] == 5
    assert {"torch", "transformers", "python", "narrows"} <= rows[0]["versions"].keys()
    assert rows[0]["machine"]["threads"] >= 1


def test_the_command_hides_the_folder_of_the_program(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/narrows", "bench", "a b"])
    assert provenance.command() == "narrows bench 'a b'"


def test_commit_is_a_hash_or_absent():
    assert re.fullmatch(r"[0-9a-f]{40}\+?", provenance.commit() or "0" * 40)


def test_json_is_one_object_a_line_without_nan(tmp_path):
    path = tmp_path / "out.json"
    report.write_json(path, [one(task="é"), one(float("nan"))])
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first["task"] == "é"
    assert second["value"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.json"
    report.write_json(path, [one()])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        report.write_json(path, [one(task=object())])
    assert path.read_bytes() == before


def test_a_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*out\.json"):
        report.write_json(tmp_path / "none" / "out.json", [one()])
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=r"cannot write .*out\.png"):
        report.draw(
            [one(task="a", keep=0.5)], tmp_path / "none" / "out.png", x="keep", panel="task"
        )


def test_the_table_shows_filled_columns_only():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table([one(task="gsm8k", keep=0.5)], ["task", "keep", "versus"]))
    text = console.export_text()
    assert "gsm8k" in text
    assert "1 to 2" in text
    assert "versus" not in text


def test_a_png_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    rows = [one(v, task=t, keep=k) for t in "ab" for k, v in ((0.5, 1.1), (0.2, 2.5))]
    report.draw(rows, path, x="keep", panel="task")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_rows_no_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no rows"):
        report.draw([], tmp_path / "out.png", x="keep", panel="task")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install narrows\[bench\]"):
        report.draw([one(task="a", keep=1)], tmp_path / "x.png", x="keep", panel="task")

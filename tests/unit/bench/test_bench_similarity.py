"""The similarity report as rows, table, picture and command."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from narrows import cli
from narrows.bench import report, similarity
from narrows.cache.similarity import MEASURES, SimilarityReport
from narrows.errors import InputError
from narrows.model.flat import FlatModel
from tiny_text import chat_model

TEXT = "On day 3 the crew counted 12 barrels and sailed on to the next port. " * 12


@pytest.fixture(scope="module")
def found() -> SimilarityReport:
    model = chat_model()
    ids = model.tokenizer(TEXT)["input_ids"][:96]
    return similarity.similarity.measure(model, ids, group=16, value_group=16)


def test_there_is_a_row_for_all_that_was_measured(found: SimilarityReport, tmp_path: Path) -> None:
    rows = similarity.rows(found)
    assert len(rows) == len(found.pairs) * len(MEASURES) * 2
    one = rows[0]
    assert one["interval"][0] <= one["value"] <= one["interval"][1]
    assert {"tensor", "pair", "method", "seed", "versions", "command", "bits"} <= one.keys()
    report.write_json(tmp_path / "rows.json", rows)
    read = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [r["value"] for r in read] == [r["value"] for r in rows]
    keys = {(r["tensor"], tuple(r["pair"]), r["metric"], r["method"]) for r in read}
    assert len(keys) == len(rows)


def test_the_table_shows_chance_beside_each_number(found: SimilarityReport) -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(similarity.table(found))
    lines = out.getvalue().splitlines()
    first = next(line for line in lines if "keys" in line and "0-1" in line)
    assert first.count("(") == len(MEASURES)
    assert "beyond chance: keys" in out.getvalue()


def test_the_picture_is_a_png(found: SimilarityReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    similarity.draw(found, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot write"):
        similarity.draw(found, tmp_path / "missing" / "out.png")


def test_the_command_measures_a_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(FlatModel, "load", classmethod(lambda *a, **k: chat_model()))
    monkeypatch.setenv("COLUMNS", "200")
    text, out = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text(TEXT)
    sizes = ["--tokens", "96", "--group", "16", "--value-group", "16", "--json", str(out)]
    done = CliRunner().invoke(cli.app, ["diagnose", "similarity", "tiny", str(text), *sizes])
    assert done.exit_code == 0, done.output
    assert "variance explained" in done.output
    assert json.loads(out.read_text().splitlines()[0])["tokens"] == 96
    short = CliRunner().invoke(cli.app, ["diagnose", "similarity", "tiny", str(text)])
    assert isinstance(short.exception, InputError)

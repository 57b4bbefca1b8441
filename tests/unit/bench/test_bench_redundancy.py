"""The redundancy report: its measures on made-up layers, and as rows, table, picture, command."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from narrows import cli
from narrows.bench import redundancy
from narrows.cache.redundancy import MEASURES, _across, _entries, _pairs, measure
from narrows.errors import ConfigError, InputError, UnsupportedModel
from tiny import pair
from tiny_text import chat_model

IDS = torch.randint(3, 101, (80,), generator=torch.Generator().manual_seed(1)).tolist()


def test_measures_of_known_vectors():
    x = torch.cat([torch.eye(4), 3 * torch.eye(4)])[None]  # four directions, twice
    assert _pairs(x, 0.9) == pytest.approx(8 / 56)
    assert _entries(x, 0.9) == 0.5
    assert _pairs(torch.ones(2, 5, 3), 0.9) == 1.0
    assert _entries(torch.ones(2, 5, 3), 0.9) == pytest.approx(0.2)


def test_the_same_token_has_the_same_key_before_rotation_only():
    flat, _ = pair("llama")
    first = measure(flat, [7] * 40).layers[0]
    assert first.keys == 1.0
    assert first.keys_rotated < 0.5
    assert first.values == 1.0
    assert first.key_entries == first.value_entries == pytest.approx(1 / 40)


def test_heads_that_share_nothing_and_heads_that_could():
    one = torch.randn(1, 6, 8)
    away = torch.zeros(1, 6, 8)
    away[..., 0] = 1
    one[..., 0] = 0  # so that it lies across
    assert _across(one) == 0
    assert _across(torch.cat([one, away])) == pytest.approx(0, abs=1e-6)
    assert _across(torch.cat([one, away, 3 * one.flip(1)])) == pytest.approx(1)


def test_every_full_layer_is_told():
    report = measure(pair("gemma3_text")[0], IDS)
    assert [layer.layer for layer in report.layers] == [2]
    report = measure(pair("llama")[0], IDS, theta_k=0.5, theta_v=0.5)
    for layer in report.layers:
        assert all(0 <= getattr(layer, m) <= 1 for m in MEASURES)
        assert layer.attention >= 0.1


def test_bad_input():
    flat = pair("llama")[0]
    with pytest.raises(InputError, match="between 2 and 512"):
        measure(flat, [1])
    with pytest.raises(ConfigError, match="theta_k"):
        measure(flat, IDS, theta_k=2)
    with pytest.raises(UnsupportedModel, match="sliding-window layers only"):
        measure(pair("mistral")[0], IDS)


def test_rows_table_and_picture(tmp_path):
    report = measure(pair("llama")[0], IDS)
    rows = redundancy.rows(report)
    assert len(rows) == len(report.layers) * len(MEASURES)
    assert {"layer", "theta_k", "versions", "command"} <= rows[0].keys()
    shown = io.StringIO()
    Console(file=shown, width=300).print(redundancy.table(report))
    assert "attention on the top tenth" in shown.getvalue()
    redundancy.draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_command(tmp_path, monkeypatch):
    document = tmp_path / "a.txt"
    document.write_text("The crew counted twelve barrels and sailed on. " * 10)
    monkeypatch.setattr(redundancy.FlatModel, "load", lambda *a, **k: chat_model())
    done = CliRunner().invoke(
        cli.app, ["diagnose", "redundancy", "any", str(document), "--json", str(tmp_path / "r")]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r").exists()

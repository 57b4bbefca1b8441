"""The program, run inside the test."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from narrows import cli
from narrows.model.flat import FlatModel
from tiny_text import chat_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs it with arguments: the exit code, and what it printed and complained about."""

    def call(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["narrows", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, program: Run) -> Run:
    """As ``program``, with the tiny model whatever model is named."""
    monkeypatch.setattr(FlatModel, "load", classmethod(lambda *a, **k: chat_model()))
    return program

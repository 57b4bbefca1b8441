"""Where data for benchmarks and training lies, and how its files are read. None is packaged."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from narrows.errors import InputError

VARIABLE = "NARROWS_DATA"
FALLBACK = Path("..") / "shared" / "data"


def locate(folder: Path | None = None) -> Path:
    """The data folder: ``folder`` if given, else the environment variable ``NARROWS_DATA``,
    else ``../shared/data``. Raises InputError, saying what to do, if it is not there."""
    named = os.environ.get(VARIABLE)
    choice = folder or (Path(named) if named else FALLBACK)
    if not choice.is_dir():
        raise InputError(
            f"no benchmark data in {choice}; give the folder with --data or set {VARIABLE}"
        )
    return choice


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, plain or gzip-compressed (a name ending in ``.gz``).

    Raises InputError for a file that is missing, unreadable or malformed, with the line.
    """
    try:
        # utf-8 by name: the data is UTF-8 whatever the locale says.
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def find(folder: Path, name: str) -> Path:
    """The file ``name`` of the data, as ``.jsonl`` or ``.jsonl.gz``. Raises InputError."""
    for ending in (".jsonl", ".jsonl.gz"):
        path = folder / f"{name}{ending}"
        if path.is_file():
            return path
    raise InputError(f"{folder} has no {name}.jsonl or {name}.jsonl.gz; check --data")


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number}: not a JSON object")
    return row

"""Options several commands share, and what they do with them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from narrows.errors import ConfigError

if TYPE_CHECKING:
    from narrows.llm import LLM

stderr = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option("--model", "-m", help="Known name, hub id, folder or GGUF.")]
Cache = Annotated[str, typer.Option(help="Cache policy spec.")]
Draft = Annotated[str, typer.Option(help="Drafter spec, none or auto.")]
Data = Annotated[
    Path | None, typer.Option(help="Data folder; default NARROWS_DATA, ../shared/data.")
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda if present.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to write.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus: smallest set with this probability.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]

Text = Annotated[
    str,
    typer.Option(help="own (the model writes it), data (the data folder), or a file or folder."),
]
Out = Annotated[Path | None, typer.Option("--json", help="Write one object a row here.")]
Picture = Annotated[Path | None, typer.Option("--plot", help="Draw a PNG here.")]
Quick = Annotated[bool, typer.Option(help="Tiny sizes, to see that all of it works.")]
Rounds = Annotated[int, typer.Option(help="Rounds measured; medians are reported.")]
DEFAULT_MODEL = "smollm2-135m"


def load_llm(model: str, cache: str, draft: str, dtype: str, device: str | None) -> LLM:
    """A model for a process that does nothing but serve it."""
    from narrows.engine.memory import settle
    from narrows.llm import LLM

    llm = LLM(model, cache=cache, draft=draft, dtype=dtype, device=device)
    settle()
    return llm


def write(text: str) -> None:
    """Put text on standard output now."""
    sys.stdout.write(text)
    sys.stdout.flush()


def check_places(*files: Path | None, folders: bool = False) -> None:
    """Refuse, before a long run, a file (or folder) that could not be written after it."""
    for file in files:
        if file is None:
            continue
        parent = file.absolute().parent
        if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
            raise ConfigError(f"cannot write {file}: its folder is missing or not writable")
        if not folders and os.path.lexists(file) and not os.path.isfile(file):
            raise ConfigError(f"cannot write {file}: it is no ordinary file; name another")


def numbers(name: str, text: str) -> list[int]:
    """``512,1024`` as numbers. Raises ConfigError with the option's ``name``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"{name}: {text!r} is not a list of whole numbers such as 512,1024")
    return [int(part) for part in parts]


def report_rows(rows: list[Any], shown: list[Any], columns: Any, json_file: Path | None) -> None:
    """Write the rows and print a table of those shown."""
    from narrows.bench import report

    if json_file is not None:
        report.write_json(json_file, rows)
    Console().print(report.table(shown, columns))

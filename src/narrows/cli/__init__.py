"""The command line: thin commands over the Python interface.

A NarrowsError is printed as one line on standard error and ends the program with code 2.
"""

from __future__ import annotations

import os
import sys

import typer

from narrows.cli import bench, cache, diagnose, listen, text, train
from narrows.cli.options import stderr
from narrows.errors import NarrowsError

app = typer.Typer(
    name="narrows",
    help="Long-context LLM inference made cheap at every stage a token passes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (text.ask, text.generate, text.chat, text.compress, text.models):
    app.command()(command)
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")
app.add_typer(train.app, name="train")
app.add_typer(diagnose.app, name="diagnose")
app.add_typer(listen.app, name="listen")


def main() -> None:
    """Entry point of the ``narrows`` program."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except NarrowsError as error:
        stderr.print(f"narrows: error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)

"""Commands that hand models on to other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrows.cli.options import write

app = typer.Typer(help="Hand a model on to other engines.", no_args_is_help=True)


@app.callback()
def export() -> None:
    """Hand a model on to other engines."""


@app.command("stock")
def stock(
    converted: Annotated[Path, typer.Argument(help="Folder of a converted model.")],
    out: Annotated[Path, typer.Option(help="New folder for the stock checkpoint.")],
) -> None:
    """A KV-Latent model of equal key and value sizes, for plain transformers or vLLM."""
    from narrows.latent.stock import export_stock
    from narrows.model.folder import check_folder

    check_folder(converted)
    model = export_stock(converted, out)
    write(f"{out}: {model.config.architectures[0]}, heads of {model.config.head_dim}\n")

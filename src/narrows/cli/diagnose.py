"""Commands that look inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from narrows.cli.options import (
    Device,
    Dtype,
    Out,
    Picture,
    check_places,
)

app = typer.Typer(help="Look inside a model.", no_args_is_help=True)


@app.command("similarity")
def similarity(
    model: Annotated[str, typer.Argument(help="Known name, hub id, folder or GGUF.")],
    text: Annotated[str, typer.Argument(help="A document to read; - for standard input.")],
    tokens: Annotated[int, typer.Option(help="Most tokens of it to read.")] = 2048,
    bits: Annotated[int, typer.Option(help="Of a code: 1, 2, 4 or 8.")] = 2,
    group: Annotated[int, typer.Option(help="Tokens of a group of keys.")] = 128,
    value_group: Annotated[int, typer.Option(help="Channels of a group of values.")] = 64,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the random order of tokens.")] = 0,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """How alike neighbouring layers' keys and values are, beside chance: what sharing can gain."""
    from narrows.bench import similarity

    check_places(json_file, plot)
    found = similarity.run(
        model=model,
        text=text,
        tokens=tokens,
        bits=bits,
        group=group,
        value_group=value_group,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    _show(similarity, found, json_file, plot)


@app.command("redundancy")
def redundancy(
    model: Annotated[str, typer.Argument(help="Known name, hub id, folder or GGUF.")],
    text: Annotated[str, typer.Argument(help="A document to read; - for standard input.")],
    tokens: Annotated[int, typer.Option(help="Most tokens of it to read.")] = 2048,
    theta_k: Annotated[float, typer.Option(help="Cosine above which keys are alike.")] = 0.98,
    theta_v: Annotated[float, typer.Option(help="Cosine above which values are alike.")] = 0.95,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """How alike a layer's vectors are and how concentrated its attention: what spindle can gain."""
    from narrows.bench import redundancy

    check_places(json_file, plot)
    found = redundancy.run(
        model=model,
        text=text,
        tokens=tokens,
        theta_k=theta_k,
        theta_v=theta_v,
        dtype=dtype,
        device=device,
    )
    _show(redundancy, found, json_file, plot)


def _show(bench: Any, found: Any, json_file: Path | None, plot: Path | None) -> None:
    """What was ``found``, as the module ``bench`` writes, prints and draws it."""
    from narrows.bench import report

    if json_file is not None:
        report.write_json(json_file, bench.rows(found))
    Console().print(bench.table(found))
    if plot is not None:
        bench.draw(found, plot)

"""Commands that make another checkpoint of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrows.cli.options import Data, Device, Dtype, Text, stderr, write

HOPELESS = 0.2
"""Nats a token from the base beyond which a model had better be healed before it is used."""

app = typer.Typer(help="Make a smaller checkpoint of a model.", no_args_is_help=True)


@app.callback()
def conversions() -> None:
    """Make a smaller checkpoint of a model."""


@app.command("kv-latent")
def kv_latent(
    model: Annotated[str, typer.Argument(help="Known name, hub id, folder or GGUF.")],
    qk: Annotated[int, typer.Option(help="Numbers of a query or key head.")],
    vo: Annotated[int, typer.Option(help="Numbers of a value head.")],
    out: Annotated[Path, typer.Option(help="New folder for the converted model.")],
    preset: Annotated[
        str,
        typer.Option(help="tuned or paper, with changes of pairs, rope, values or gain behind a :"),
    ] = "tuned",
    text: Text = "own",
    data: Data = None,
    windows: Annotated[int, typer.Option(help="Windows of text looked at.")] = 32,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the text.")] = 0,
) -> None:
    """KV-Latent: fewer key and value dimensions. Tells what it costs before any training."""
    from narrows.conversion import convert

    told = convert(
        model,
        out,
        qk=qk,
        vo=vo,
        preset=preset,
        text=text,
        data=data,
        windows=windows,
        window=window,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    write(f"{out}: {told}\n")
    if told.kl > HOPELESS:
        stderr.print("[dim]of little use before it is healed: narrows train kv-latent[/dim]")

"""Commands that read documents once, for many questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from narrows.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    Device,
    Draft,
    Dtype,
    MaxTokens,
    Model,
    Temperature,
    check_places,
    load_llm,
    stderr,
    write,
)

app = typer.Typer(help="Read documents once, ask about them later.", no_args_is_help=True)


@app.command("save")
def save(
    out: Annotated[Path, typer.Argument(help="File to write.")],
    doc: Annotated[
        list[str], typer.Option("--doc", "-d", help="Document; - for standard input. Repeatable.")
    ],
    cache: Annotated[str, typer.Option(help="Cache policy spec.")] = "spindle:preset=tuned",
    method: Annotated[
        str, typer.Option(help="Compression method for documents beyond the window, or none.")
    ] = "none",
    model: Model = DEFAULT_MODEL,
    draft: Draft = "auto",
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Read documents and keep their compressed cache in a file."""
    from narrows.cache.saved import save_cache
    from narrows.pipeline import read
    from narrows.retrieve.documents import read_documents

    check_places(out)
    documents = read_documents(doc)  # before the model is loaded, which takes longer
    llm = load_llm(model, cache, draft, dtype, device)
    saved = read(llm, documents=documents, method=method)
    save_cache(saved, out)
    stderr.print(
        f"[dim]{len(saved.tokens):,} tokens, {saved.nbytes / 2**20:.1f} MiB of {saved.spec} "
        f"in {out}[/dim]"
    )


@app.command("load")
def load(
    file: Annotated[Path, typer.Argument(help="What narrows cache save wrote.")],
    questions: Annotated[
        list[str] | None, typer.Argument(help="Asked one after the other; none: what it holds.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    draft: Draft = "auto",
    dtype: Dtype = "bfloat16",
    device: Device = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    as_json: AsJson = False,
) -> None:
    """Answer questions from a saved cache, without reading its documents again."""
    from narrows.cache.saved import describe_cache
    from narrows.config import SamplingParams
    from narrows.pipeline import ask_saved

    told = describe_cache(file)
    if not questions:
        write(json.dumps(told) + "\n")
        return
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    llm = load_llm(model, told["spec"], draft, dtype, device)
    saved = llm.load_cache(file)
    for question in questions:
        answer = ask_saved(llm, saved, question, params=params, on_text=None if as_json else write)
        if as_json:
            row = {"question": question, **answer.to_dict()}
            write(json.dumps(row, ensure_ascii=False))
        write("\n")
        stderr.print(
            f"[dim]first token after {answer.savings.seconds['prefill']:.2f} s, "
            f"{answer.savings.cache_bytes / 2**20:.1f} MiB of cache[/dim]"
        )

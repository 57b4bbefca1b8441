"""Commands that answer, write, talk and compress."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrows.cli.listen import hearing
from narrows.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    Cache,
    Device,
    Draft,
    Dtype,
    MaxTokens,
    Model,
    Seed,
    Temperature,
    TopP,
    load_llm,
    stderr,
    write,
)
from narrows.errors import InputError

CITED = 3
"""Sources named behind an answer from recordings, best first; --json has them all."""

if TYPE_CHECKING:
    from narrows.listen import Listener
    from narrows.pipeline import Answer


def _params(max_tokens: int, temperature: float, top_p: float, seed: int | None) -> Any:
    from narrows.config import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)


def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    doc: Annotated[
        list[str] | None,
        typer.Option("--doc", "-d", help="Text, Markdown, HTML or PDF; - for standard input."),
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option("--audio", "-a", help="A recording. Repeatable.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Most document tokens given to the model.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="rank, a compression method, rank+METHOD, or none.")
    ] = "rank",
    ranker: Annotated[str, typer.Option(help="bm25 or minilm.")] = "bm25",
    model: Model = DEFAULT_MODEL,
    cache: Cache = "dense",
    draft: Draft = "auto",
    dtype: Dtype = "bfloat16",
    device: Device = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question from documents and recordings of any length, and say what was saved."""
    from narrows.pipeline import ask as answer_question
    from narrows.retrieve.documents import read_documents

    params = _params(max_tokens, temperature, top_p, seed)
    if not question.strip():
        raise InputError("the question is empty; say what to answer")
    documents = read_documents(doc or [])  # before the model is loaded, which takes longer
    listener = _listener(audio) if audio else None
    llm = load_llm(model, cache, draft, dtype, device)
    answer = answer_question(
        llm,
        question,
        documents=documents,
        listener=listener,
        budget=budget,
        method=method,
        ranker=ranker,
        params=params,
        on_text=None if as_json else write,
    )
    if as_json:
        write(json.dumps(answer.to_dict(), ensure_ascii=False) + "\n")
        return
    write("\n")
    if audio:
        best = sorted(answer.sources, key=lambda source: -(source.score or 0.0))[:CITED]
        stderr.print(escape(f"\nfrom {', '.join(source.document for source in best)}"))
    _print_savings(answer)


def _listener(audio: list[str]) -> Listener:
    from narrows.listen import Listener

    with hearing(audio) as on_heard:
        return Listener.hear(audio, on_heard=on_heard)


def _print_savings(answer: Answer) -> None:
    saved = answer.savings
    share = saved.kept_tokens / max(1, saved.document_tokens)
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in saved.seconds.items())
    stderr.print(
        f"\n[dim]tokens   {saved.document_tokens:,} in the documents -> {saved.kept_tokens:,} "
        f"given to the model ({share:.1%})\n"
        f"cache    {saved.cache_bytes / 2**20:.1f} MiB, {saved.sealed_cache_bytes / 2**20:.1f} MiB "
        f"once the prompt was read (whole input: "
        f"{saved.full_cache_bytes / 2**20:.1f} MiB)\n"
        f"seconds  {times}\n"
        f"speed    {saved.tokens_per_second:.1f} tokens/s; {saved.answer_tokens} tokens in "
        f"{saved.steps} steps, {saved.accepted_tokens} of {saved.drafted_tokens} guesses right"
        "[/dim]"
    )


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - for standard input.")],
    model: Model = DEFAULT_MODEL,
    cache: Cache = "dense",
    draft: Draft = "auto",
    dtype: Dtype = "bfloat16",
    device: Device = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text as it stands, without a chat template."""
    params = _params(max_tokens, temperature, top_p, seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InputError("the prompt is empty; give some text to continue")
    llm = load_llm(model, cache, draft, dtype, device)
    request = llm.submit(text, params)
    for piece in llm.follow(request):
        if not as_json:
            write(piece)
    if as_json:
        done = request.completion()
        row = {
            "text": done.text,
            "token_ids": done.token_ids,
            "finish_reason": done.finish_reason,
            "prompt_tokens": done.metrics.prompt_tokens,
            "tokens_per_second": done.metrics.tokens_per_second,
        }
        write(json.dumps(row, ensure_ascii=False))
    write("\n")


def chat(
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    model: Model = DEFAULT_MODEL,
    cache: Cache = "dense",
    draft: Draft = "auto",
    dtype: Dtype = "bfloat16",
    device: Device = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
) -> None:
    """Talk to the model, a line a turn; an empty line or end of input leaves."""
    params = _params(max_tokens, temperature, top_p, seed)
    llm = load_llm(model, cache, draft, dtype, device)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        if sys.stdin.isatty():
            stderr.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages.append({"role": "user", "content": line})
        reply = ""
        for piece in llm.stream_chat(messages, params):
            reply += piece
            write(piece)
        write("\n")
        messages.append({"role": "assistant", "content": reply})


def compress(
    path: Annotated[str, typer.Argument(help="Text or JSON messages; - for standard input.")] = "-",
    keep: Annotated[float | None, typer.Option(help="Share of tokens to keep, 0 to 1.")] = None,
    target_tokens: Annotated[int | None, typer.Option(help="Most tokens to keep.")] = None,
    method: Annotated[str, typer.Option(help="A compression method.")] = "dac",
    question: Annotated[str | None, typer.Option(help="For methods that use one.")] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="Text that must survive, or a class such as @digits. Repeatable."),
    ] = None,
    chat_json: Annotated[
        bool, typer.Option("--chat", help="The input is JSON: a list of role/content messages.")
    ] = False,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Shorten a text (or a conversation) to a token budget, keeping what matters."""
    from narrows.compression import make_compressor
    from narrows.compression.segments import compress_messages
    from narrows.model.flat import FlatModel
    from narrows.retrieve.documents import read_document

    text = read_document(path).text
    messages = _messages(text, path) if chat_json else None
    loaded = FlatModel.load(model, dtype=dtype, device=device)
    compressor = make_compressor(method, loaded, protect=tuple(protect or ()))
    if messages is not None:
        shorter, result = compress_messages(
            compressor, messages, target_tokens=target_tokens, keep_ratio=keep, question=question
        )
        write(json.dumps(shorter, ensure_ascii=False, indent=None if as_json else 2) + "\n")
    else:
        result = compressor.compress(
            text, target_tokens=target_tokens, keep_ratio=keep, question=question
        )
        write(result.to_json() + "\n" if as_json else result.text)
    stderr.print(
        f"[dim]{result.original_tokens:,} tokens -> {result.tokens:,} ({result.ratio:.1%}) "
        f"by {result.method}[/dim]"
    )


def _messages(text: str, path: str) -> list[dict[str, str]]:
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good:
        raise InputError(f"{path}: not a list of messages with text under role and content")
    return messages  # type: ignore[no-any-return]


def models() -> None:
    """List the known models and which of them are here."""
    from narrows.model.hub import known_models

    table = Table(box=None)
    for column in ("name", "for", "source", "download", "licence", "here"):
        table.add_column(column)
    for info in known_models():
        table.add_row(
            info.name,
            info.role,
            info.source,
            f"{info.size / 1e6:.0f} MB",
            info.licence,
            "yes" if info.cached else "no",
        )
    Console().print(table)

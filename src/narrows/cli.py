"""The command line: thin commands over the Python interface.

A NarrowsError is printed as one line on standard error and ends the program with code 2.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from narrows.errors import ConfigError, InputError, NarrowsError

if TYPE_CHECKING:
    from narrows.llm import LLM
    from narrows.pipeline import Answer

app = typer.Typer(
    name="narrows",
    help="Long-context LLM inference made cheap at every stage a token passes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure, as ratios within one run.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
train_app = typer.Typer(help="Train small parts for a model.", no_args_is_help=True)
app.add_typer(train_app, name="train")
diagnose_app = typer.Typer(help="Look inside a model.", no_args_is_help=True)
app.add_typer(diagnose_app, name="diagnose")
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
DEFAULT_MODEL = "smollm2-135m"


def _load(model: str, cache: str, draft: str, dtype: str, device: str | None) -> LLM:
    from narrows.llm import LLM

    return LLM(model, cache=cache, draft=draft, dtype=dtype, device=device)


def _params(max_tokens: int, temperature: float, top_p: float, seed: int | None) -> Any:
    from narrows.config import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    doc: Annotated[
        list[str] | None,
        typer.Option("--doc", "-d", help="Text, Markdown, HTML or PDF; - for standard input."),
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
    """Answer a question from documents of any length, and say what was saved."""
    from narrows.pipeline import ask as answer_question
    from narrows.retrieve.documents import read_documents

    params = _params(max_tokens, temperature, top_p, seed)
    if not question.strip():
        raise InputError("the question is empty; say what to answer")
    documents = read_documents(doc or [])  # before the model is loaded, which takes longer
    llm = _load(model, cache, draft, dtype, device)
    answer = answer_question(
        llm,
        question,
        documents=documents,
        budget=budget,
        method=method,
        ranker=ranker,
        params=params,
        on_text=None if as_json else _write,
    )
    if as_json:
        _write(json.dumps(answer.to_dict(), ensure_ascii=False) + "\n")
        return
    _write("\n")
    _print_savings(answer)


def _print_savings(answer: Answer) -> None:
    saved = answer.savings
    share = saved.kept_tokens / max(1, saved.document_tokens)
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in saved.seconds.items())
    stderr.print(
        f"\n[dim]tokens   {saved.document_tokens:,} in the documents -> {saved.kept_tokens:,} "
        f"given to the model ({share:.1%})\n"
        f"cache    {saved.cache_bytes / 2**20:.1f} MiB (whole input: "
        f"{saved.full_cache_bytes / 2**20:.1f} MiB)\n"
        f"seconds  {times}\n"
        f"speed    {saved.tokens_per_second:.1f} tokens/s; {saved.answer_tokens} tokens in "
        f"{saved.steps} steps, {saved.accepted_tokens} of {saved.drafted_tokens} guesses right"
        "[/dim]"
    )


@app.command()
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
    llm = _load(model, cache, draft, dtype, device)
    request = llm.submit(text, params)
    for piece in llm.follow(request):
        if not as_json:
            _write(piece)
    if as_json:
        done = request.completion()
        row = {
            "text": done.text,
            "token_ids": done.token_ids,
            "finish_reason": done.finish_reason,
            "prompt_tokens": done.metrics.prompt_tokens,
            "tokens_per_second": done.metrics.tokens_per_second,
        }
        _write(json.dumps(row, ensure_ascii=False))
    _write("\n")


@app.command()
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
    llm = _load(model, cache, draft, dtype, device)
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
            _write(piece)
        _write("\n")
        messages.append({"role": "assistant", "content": reply})


@app.command()
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
        _write(json.dumps(shorter, ensure_ascii=False, indent=None if as_json else 2) + "\n")
    else:
        result = compressor.compress(
            text, target_tokens=target_tokens, keep_ratio=keep, question=question
        )
        _write(result.to_json() + "\n" if as_json else result.text)
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


@app.command()
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


Out = Annotated[Path | None, typer.Option("--json", help="Write one object a row here.")]
Picture = Annotated[Path | None, typer.Option("--plot", help="Draw a PNG here.")]
Quick = Annotated[bool, typer.Option(help="Tiny sizes, to see that all of it works.")]
Rounds = Annotated[int, typer.Option(help="Rounds measured; medians are reported.")]


def _check_places(*files: Path | None) -> None:
    """Refuse, before a long run, a file that could not be written after it."""
    for file in files:
        if file is not None and not os.access(file.absolute().parent, os.W_OK):
            raise ConfigError(f"cannot write {file}: its folder is missing or not writable")


def _report(rows: list[Any], shown: list[Any], columns: Any, json_file: Path | None) -> None:
    from narrows.bench import report

    if json_file is not None:
        report.write_json(json_file, rows)
    Console().print(report.table(shown, columns))


@train_app.command("specformer")
def train_specformer(
    out: Annotated[Path, typer.Option(help="Folder for the drafter; a run there goes on.")],
    target: Annotated[
        str, typer.Option(help="Known name, hub id, folder or GGUF.")
    ] = DEFAULT_MODEL,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON Lines of prompts; default: the data folder's.")
    ] = None,
    data: Data = None,
    count: Annotated[int, typer.Option(help="Prompts taken from the data folder.")] = 2000,
    long_count: Annotated[
        int, typer.Option(help="Extension: as many long prompts from the data folder besides.")
    ] = 0,
    long_tokens: Annotated[int, typer.Option(help="Tokens of a long prompt, about.")] = 2000,
    steps: Annotated[int, typer.Option(help="Updates.")] = 500,
    slots: Annotated[int, typer.Option(help="Tokens forecast at once.")] = 4,
    anchor: Annotated[bool, typer.Option(help="Extension: slots see the newest token.")] = False,
    markov: Annotated[
        int, typer.Option(help="Extension: rank of what a token adds to its followers' scores.")
    ] = 0,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Extension: guess from so many common tokens only.")
    ] = None,
    distill: Annotated[
        float, typer.Option(help="Extension: share of the loss against the target's own scores.")
    ] = 0.0,
    linear_start: Annotated[
        bool, typer.Option(help="Extension: begin as the best linear forecast.")
    ] = False,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 6e-4,
    answer_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of an update, about.")] = 4096,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 50,
    start: Annotated[
        Path | None, typer.Option("--from", help="Go on from this trained drafter.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of prompts, weights and order.")] = 0,
) -> None:
    """A SpecFormer drafter for a model, taught by the model's own answers. Runs in several
    processes if started by `accelerate launch`."""
    from narrows.bench.progress import Progress
    from narrows.data import locate
    from narrows.draft.specformer import SpecFormer
    from narrows.draft.specformer_drafter import check_target
    from narrows.llm import LLM
    from narrows.train import specformer
    from narrows.train.loop import LoopOptions, processes
    from narrows.train.prompts import CHARACTERS, from_data, from_file, long_from_data

    options = LoopOptions(steps=steps, rate=rate, save_every=save_every)
    _check_places(out)
    texts = from_file(prompts) if prompts else from_data(locate(data), count, seed)
    longest = 1024
    if long_count:
        texts += long_from_data(locate(data), long_count, CHARACTERS * long_tokens, seed)
        random.Random(seed).shuffle(texts)  # those held out are the last
        longest = max(longest, 2 * long_tokens)
    first = processes(device).is_main_process
    llm = LLM(target, draft="none", dtype=dtype, device=device)
    module = None
    if start is not None:
        module = SpecFormer.load(start)
        check_target(module.config, llm.model)
    with Progress("answers, then updates", visible=first) as progress:
        progress.expect(len(texts) + steps)
        history = specformer.run(
            llm,
            texts,
            out,
            options,
            module=module,
            distill=distill,
            linear_start=linear_start,
            max_tokens=answer_tokens,
            longest=longest,
            batch_tokens=batch_tokens,
            seed=seed,
            on_answers=progress.advance,
            on_step=lambda step, told: progress.advance(),
            slots=slots,
            anchor=anchor,
            markov=markov,
            draft_vocab=draft_vocab,
        )
    if not first:
        return
    specformer.draw(history, out / "curves.png")
    last = history[-1]
    _write(f"{out}: {last['kappa']:.2f} tokens a step on held-out answers, teacher-forced\n")


@diagnose_app.command("similarity")
def diagnose_similarity(
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
    from narrows.bench import report, similarity

    _check_places(json_file, plot)
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
    if json_file is not None:
        report.write_json(json_file, similarity.rows(found))
    Console().print(similarity.table(found))
    if plot is not None:
        similarity.draw(found, plot)


@bench_app.command("engine")
def bench_engine(
    model: Model = DEFAULT_MODEL,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default bfloat16 and float32.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable; default 1, 8, 32.")] = None,
    prefill: Annotated[
        list[int] | None, typer.Option(help="Prompt tokens; default 1000, 4000, 8000.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens written for every prompt.")] = 64,
    repeats: Rounds = 3,
    vllm: Annotated[bool, typer.Option(help="Also vLLM's CPU build, in its own place.")] = False,
    cache: Cache = "dense",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    quick: Quick = False,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """Decoding and prefill against transformers' generate, in one process."""
    from narrows.bench import engine, report

    _check_places(json_file, plot)
    rows = engine.run(
        model=model,
        dtypes=dtype or ("bfloat16", "float32"),
        batches=batch or (1, 8, 32),
        prefill=prefill or (1000, 4000, 8000),
        new_tokens=new_tokens,
        repeats=repeats,
        vllm=vllm,
        cache=cache,
        device=device,
        seed=seed,
        quick=quick,
    )
    _report(rows, rows, engine.COLUMNS, json_file)
    if plot is not None:
        report.draw(engine.curves(rows), plot, x="batch", panel="dtype")


@bench_app.command("draft")
def bench_draft(
    model: Model = DEFAULT_MODEL,
    data: Data = None,
    draft: Annotated[
        list[str] | None, typer.Option(help="Drafter spec or folder. Repeatable; default lookup.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable; default 1 to 32.")] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of text to summarize; 0: short questions.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens written for every prompt.")] = 96,
    rounds: Rounds = 3,
    draft_tokens: Annotated[
        int | None, typer.Option(help="Guesses verified a step; default: what is fastest.")
    ] = None,
    cache: Cache = "dense",
    peers: Annotated[
        bool, typer.Option(help="At batch 1, transformers and its prompt lookup too.")
    ] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    quick: Quick = False,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """Drafting against plain decoding in the same engine."""
    from narrows.bench import draft as bench
    from narrows.bench import report

    _check_places(json_file, plot)
    chosen = {"drafters": draft, "batches": batch, "contexts": context}
    rows = bench.run(
        model=model,
        data=data,
        new_tokens=new_tokens,
        rounds=rounds,
        fixed=draft_tokens,
        cache=cache,
        peers=peers,
        dtype=dtype,
        device=device,
        seed=seed,
        quick=quick,
        **{name: value for name, value in chosen.items() if value},  # type: ignore[arg-type]
    )
    _report(rows, bench.summary(rows), bench.COLUMNS, json_file)
    if plot is not None:
        report.draw(bench.curves(rows), plot, x="batch", panel="context")


@bench_app.command("compress")
def bench_compress(
    model: Model = DEFAULT_MODEL,
    data: Data = None,
    part: Annotated[
        list[str] | None, typer.Option(help="likelihood, answers, time, claims. Repeatable.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="gsm8k, longbench, lost_in_the_middle, key_value, needle."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="The first is compared with each other one.")
    ] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Shares of tokens kept.")] = None,
    token_budget: Annotated[
        int, typer.Option(help="Tokens kept of contexts longer than the window.")
    ] = 2000,
    limit: Annotated[int | None, typer.Option(help="Items a suite.")] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of exemplars, deletion and bootstrap.")] = 0,
    records: Annotated[
        Path | None, typer.Option(help="Remembers each item, so that a run can go on.")
    ] = None,
    quick: Quick = False,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """Compression methods at equal budgets: likelihood and score of the answers, and time."""
    from narrows.bench import compress as bench
    from narrows.bench import report

    _check_places(json_file, plot, records)
    chosen = {"parts": part, "tasks": task, "methods": method, "keep": keep}
    rows = bench.run(
        model=model,
        data=data,
        token_budget=token_budget,
        limit=limit,
        dtype=dtype,
        device=device,
        seed=seed,
        records=records,
        quick=quick,
        **{name: value for name, value in chosen.items() if value},  # type: ignore[arg-type]
    )
    _report(rows, bench.summary(rows), bench.COLUMNS, json_file)
    if plot is not None:
        report.draw(bench.curves(rows), plot, x="budget", panel="task")


@bench_app.command("cache")
def bench_cache(
    model: Model = DEFAULT_MODEL,
    data: Data = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="bytes, quality, retrieval, time, memory. Repeatable; default all."),
    ] = None,
    cache: Annotated[
        list[str] | None, typer.Option(help="Cache policy spec. Repeatable; dense is always run.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="transformers, quanto4, quanto2, hqq4, hqq2 or none. Repeatable."),
    ] = None,
    versus: Annotated[
        list[str] | None, typer.Option(help="What all others are compared with. Repeatable.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Of text, each from another document.")] = 16,
    prefix: Annotated[int, typer.Option(help="Tokens of a window read as a prompt.")] = 1536,
    decoded: Annotated[int, typer.Option(help="Tokens fed one by one after it.")] = 128,
    held: Annotated[
        list[int] | None, typer.Option(help="Tokens at which bytes count; 1024, 4096, 8192.")
    ] = None,
    retrieval: Annotated[
        list[int] | None, typer.Option(help="Context tokens around a fact; default 1024, 2048.")
    ] = None,
    probes: Annotated[int, typer.Option(help="Facts a task, length and depth.")] = 4,
    length: Annotated[
        list[int] | None, typer.Option(help="Contexts timed; 512, 1024, 2048, 4096, 8000.")
    ] = None,
    rounds: Rounds = 8,
    steps: Annotated[int, typer.Option(help="Decoding steps a round.")] = 16,
    memory: Annotated[int, typer.Option(help="Prompt tokens for peak memory.")] = 4096,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of text, facts and bootstrap.")] = 0,
    quick: Quick = False,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """Caches side by side: bytes, predictions against dense, retrieval, time, memory."""
    from narrows.bench import cache as bench
    from narrows.bench import report

    _check_places(json_file, plot)
    chosen = {
        "parts": part,
        "caches": cache,
        "peers": peer,
        "versus": versus,
        "held": held,
        "retrieval": retrieval,
        "lengths": length,
    }
    rows = bench.run(
        model=model,
        data=data,
        windows=windows,
        prefix=prefix,
        decoded=decoded,
        probes=probes,
        rounds=rounds,
        steps=steps,
        memory=memory,
        dtype=dtype,
        device=device,
        seed=seed,
        quick=quick,
        **{name: value for name, value in chosen.items() if value},  # type: ignore[arg-type]
    )
    if json_file is not None:
        report.write_json(json_file, rows)
    for table in bench.tables(rows):
        Console().print(table)
    if plot is not None:
        report.draw_points(bench.points(rows), plot, x="true_bits")


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

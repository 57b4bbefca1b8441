"""Commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from narrows.cli.options import (
    DEFAULT_MODEL,
    Cache,
    Data,
    Device,
    Dtype,
    Model,
    Out,
    Picture,
    Quick,
    Rounds,
    Text,
    check_places,
    numbers,
    report_rows,
)

app = typer.Typer(help="Measure, as ratios within one run.", no_args_is_help=True)


@app.command("engine")
def engine(
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

    check_places(json_file, plot)
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
    report_rows(rows, rows, engine.COLUMNS, json_file)
    if plot is not None:
        report.draw(engine.curves(rows), plot, x="batch", panel="dtype")


@app.command("draft")
def draft(
    model: Model = DEFAULT_MODEL,
    data: Data = None,
    draft: Annotated[
        list[str] | None, typer.Option(help="Drafter spec or folder. Repeatable; default lookup.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable; default 1 to 32.")] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of text to summarize; 0: short questions.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens written for a prompt at most.")] = 192,
    requests: Annotated[
        int, typer.Option(help="Prompts of a round for each answered at a time.")
    ] = 4,
    rounds: Rounds = 3,
    prefill_chunk: Annotated[int, typer.Option(help="Prompt tokens of a step at most.")] = 512,
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

    check_places(json_file, plot)
    chosen = {"drafters": draft, "batches": batch, "contexts": context}
    rows = bench.run(
        model=model,
        data=data,
        new_tokens=new_tokens,
        requests=requests,
        rounds=rounds,
        prefill_chunk=prefill_chunk,
        fixed=draft_tokens,
        cache=cache,
        peers=peers,
        dtype=dtype,
        device=device,
        seed=seed,
        quick=quick,
        **{name: value for name, value in chosen.items() if value},  # type: ignore[arg-type]
    )
    report_rows(rows, bench.summary(rows), bench.COLUMNS, json_file)
    if plot is not None:
        report.draw(bench.curves(rows), plot, x="batch", panel="context")


@app.command("compress")
def compress(
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
    llmlingua: Annotated[
        bool, typer.Option(help="Also time the package llmlingua, in its own place.")
    ] = False,
    quick: Quick = False,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """Compression methods at equal budgets: likelihood and score of the answers, and time."""
    from narrows.bench import compress as bench
    from narrows.bench import report

    check_places(json_file, plot, records)
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
        released=llmlingua,
        quick=quick,
        **{name: value for name, value in chosen.items() if value},  # type: ignore[arg-type]
    )
    report_rows(rows, bench.summary(rows), bench.COLUMNS, json_file)
    if plot is not None:
        report.draw(bench.curves(rows), plot, x="budget", panel="task")


@app.command("cache")
def cache(
    model: Model = DEFAULT_MODEL,
    data: Data = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="bytes, quality, retrieval, time, memory. Repeatable; default all."),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="Cache policy spec; an evicting one may end in @ and the share of bytes kept. "
            "Repeatable; dense is always run."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="transformers, quanto4, quanto2, hqq4, hqq2, kvpress-snapkv@0.5 (or another press "
            "and share) or none. Repeatable."
        ),
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
    question: Annotated[
        list[str] | None,
        typer.Option(help="hidden until the cache is compressed, or visible. Repeatable."),
    ] = None,
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

    check_places(json_file, plot)
    chosen = {
        "parts": part,
        "caches": cache,
        "peers": peer,
        "versus": versus,
        "held": held,
        "retrieval": retrieval,
        "questions": question,
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
    for table in report.tables(rows):
        Console().print(table)
    if plot is not None:
        report.draw_points(bench.points(rows), plot, x="true_bits", label="series")


@app.command("latent")
def latent(
    model: Model = DEFAULT_MODEL,
    data: Data = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Key and value sizes, 32x32,48x16, or none; default: pairs of quarters."),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="As of convert kv-latent. Repeatable; default tuned.")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="Converted folder, healed or not. Repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Cache policy spec of the base, an evicting one with @ and the share of bytes "
            "kept, or none. Repeatable."
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="bytes, text, choices, quality, retrieval, time, stock. Repeatable; default all."
        ),
    ] = None,
    vllm: Annotated[
        bool, typer.Option(help="Stock exports also in vLLM's CPU build, in its own place.")
    ] = False,
    text: Text = "own",
    windows: Annotated[int, typer.Option(help="Of text, each from another document.")] = 32,
    window_tokens: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    decoded: Annotated[int, typer.Option(help="Of them fed one by one beside caches.")] = 64,
    choices: Annotated[int, typer.Option(help="Items a multiple-choice task.")] = 200,
    needle_lengths: Annotated[
        str, typer.Option(help="Context tokens around a fact.")
    ] = "512,1024,2048",
    probes: Annotated[int, typer.Option(help="Facts a task, length and depth.")] = 2,
    time_context: Annotated[str, typer.Option(help="Contexts and prompts timed.")] = "4096,8000",
    rounds: Rounds = 4,
    steps: Annotated[int, typer.Option(help="Decoding steps a round.")] = 16,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of text, facts and bootstrap.")] = 0,
    quick: Quick = False,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """KV-Latent conversions beside their base: bytes, text, choices, retrieval, time; and their
    stock exports elsewhere."""
    from narrows.bench import latent as bench
    from narrows.bench import latent_figure, report
    from narrows.bench.latent_models import parse_sizes

    check_places(json_file, plot)
    chosen = {"presets": preset, "also": also, "peers": peer, "parts": part}
    rows = bench.run(
        model=model,
        data=data,
        sizes=None if sizes is None else parse_sizes(sizes),
        vllm=vllm,
        text=text,
        windows=windows,
        tokens=window_tokens,
        decoded=decoded,
        choices=choices,
        needles=numbers("needle-lengths", needle_lengths),
        probes=probes,
        lengths=numbers("time-context", time_context),
        rounds=rounds,
        steps=steps,
        dtype=dtype,
        device=device,
        seed=seed,
        quick=quick,
        **{name: value for name, value in chosen.items() if value},  # type: ignore[arg-type]
    )
    if json_file is not None:
        report.write_json(json_file, rows)
    for table in report.tables(rows):
        Console().print(table)
    if plot is not None:
        latent_figure.draw(rows, plot)


@app.command("listen")
def listen(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend spec, or oracle. Repeatable; the first is compared with."),
    ] = None,
    data: Data = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="find, words, errors, answers, time, search, index. Repeatable; default all."
        ),
    ] = None,
    clips: Annotated[int, typer.Option(help="Clips of synthetic voices, with questions.")] = 720,
    voice: Annotated[
        list[str] | None,
        typer.Option(
            help="Program and voice that speak them: flite, espeak-ng or hibari (a package of "
            "neural voices). Repeatable; default flite rms and espeak-ng en-gb-x-rp+f5."
        ),
    ] = None,
    sizes: Annotated[str, typer.Option(help="Smaller collections searched too.")] = "100,300",
    noise: Annotated[
        list[float] | None,
        typer.Option(help="Decibels of voices above noise. Repeatable; default 10 and 0."),
    ] = None,
    noisy_clips: Annotated[int, typer.Option(help="Clips heard in noise.")] = 300,
    answers: Annotated[int, typer.Option(help="Questions a model answers from clips.")] = 100,
    model: Model = DEFAULT_MODEL,
    timed_clips: Annotated[int, typer.Option(help="Clips heard in a round of timing.")] = 32,
    rounds: Rounds = 3,
    searched: Annotated[int, typer.Option(help="Clips among which a search is timed.")] = 10_000,
    minutes: Annotated[str, typer.Option(help="Lengths of recordings indexed.")] = "10,30",
    work: Annotated[
        Path | None, typer.Option(help="Keeps what was heard, so that a run can go on.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of clips, voices, noise and bootstrap.")] = 0,
    quick: Quick = False,
    json_file: Out = None,
    plot: Picture = None,
) -> None:
    """Backends that hear, side by side: clips found, words, answers, compute. The voices need
    flite and espeak-ng."""
    from narrows.bench import listen as bench
    from narrows.bench import report

    check_places(json_file, plot)
    chosen = {"backends": backend, "parts": part, "noises": noise, "voices": voice}
    rows = bench.run(
        data=data,
        clips=clips,
        sizes=numbers("sizes", sizes),
        noisy_clips=noisy_clips,
        answers=answers,
        model=model,
        timed_clips=timed_clips,
        rounds=rounds,
        searched=searched,
        minutes=numbers("minutes", minutes),
        work=work,
        seed=seed,
        quick=quick,
        **{name: value for name, value in chosen.items() if value},  # type: ignore[arg-type]
    )
    report_rows(rows, bench.summary(rows), bench.COLUMNS, json_file)
    if plot is not None:
        report.draw(bench.curves(rows), plot, x="noise", panel="voice")

"""``narrows bench draft``: what drafting gains, against the same engine without it.

Drafters take turns within every round, on the same prompts. A speed counts the steps in which
nothing but decoding happened; ``speed_up`` those of them in which the batch was full, as a queue
keeps a server's, and ``speed_up_to_end`` all, down to the last sequence of the batch alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from narrows.bench.progress import Progress
from narrows.bench.prose import read_windows
from narrows.bench.provenance import provenance
from narrows.bench.report import Row, repeated_row, with_provenance
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.data import find, locate, read_rows
from narrows.draft.specs import NONE, make_drafter
from narrows.engine.engine import Engine, Step
from narrows.errors import ConfigError, InputError
from narrows.llm import LLM

COLUMNS = ("context", "batch", "method", "versus")
"""Columns of the printed table."""


@dataclass(frozen=True, slots=True)
class Round:
    """One batch written once: tokens per second, of the full batch and down to its end, and
    milliseconds a step while decoding, tokens committed a step and sequence, guesses verified a
    step and sequence, shares of guesses kept by place, and the texts."""

    speed: float
    speed_to_end: float
    step_ms: float
    kappa: float
    kept: list[float]
    drafted: float
    texts: list[list[int]]


def run(
    *,
    model: str = "smollm2-135m",
    data: Path | None = None,
    drafters: Sequence[str] = ("lookup",),
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32),
    contexts: Sequence[int] = (0,),
    new_tokens: int = 96,
    rounds: int = 3,
    fixed: int | None = None,
    cache: str = "dense",
    dtype: str = "bfloat16",
    device: str | None = None,
    seed: int = 0,
    quick: bool = False,
    show_progress: bool = True,
) -> list[Row]:
    """Measure and return rows, provenance included; medians over rounds with min-max.

    Args:
        drafters: specs; each is compared with no drafter.
        batches: distinct prompts at a time.
        contexts: 0 asks Spec-Bench's questions as they are; otherwise a summary of a text of
            that many tokens, another one for each prompt.
        new_tokens: written for every prompt, whatever ends a text.
        rounds: measured; one more before them is not counted.
        fixed: guesses verified a step; None lets the engine choose.
        cache: spec of the target's cache.
        quick: tiny sizes, to see that all of it works.

    Raises ConfigError, InputError or ModelError.
    """
    if not drafters or min(batches, default=0) < 1 or min(contexts, default=-1) < 0:
        raise ConfigError("give drafters, batches of at least 1 and contexts of at least 0 tokens")
    if min(new_tokens - 3, rounds - 1) < 0:
        raise ConfigError("new_tokens must be at least 4 and rounds at least 1")
    if quick:
        batches, contexts, new_tokens, rounds = batches[:1], contexts[:1], 8, 1
    folder = locate(data)
    llm = LLM(model, dtype=dtype, device=device, draft=NONE)
    for spec in drafters:
        make_drafter(spec, llm.model)  # refuse a wrong one before hours of work
    rows: list[Row] = []
    with Progress("batches", visible=show_progress) as progress:
        progress.expect(len(batches) * len(contexts))
        for context in contexts:
            for batch in batches:
                prompts = _prompts(llm, folder, batch, context, seed)
                sides: dict[str, list[Round]] = {spec: [] for spec in (NONE, *drafters)}
                for _ in range(rounds + 1):
                    for spec, made in sides.items():
                        made.append(_write(llm, spec, cache, fixed, prompts, new_tokens))
                where = {"context": context, "batch": batch, "cache": cache, "dtype": dtype}
                rows += _rows(model, {k: v[1:] for k, v in sides.items()}, where)
                progress.advance()
    return with_provenance(rows, provenance(seed))


def _rows(model: str, sides: dict[str, list[Round]], where: dict[str, object]) -> list[Row]:
    plain = sides[NONE]
    rows = []
    for spec, made in sides.items():

        def one(metric: str, unit: str, values: list[float], spec: str = spec, **more: str) -> Row:
            return repeated_row("draft", spec, model, metric, unit, values, **where, **more)

        rows.append(one("speed", "tokens/s", [r.speed for r in made]))
        rows.append(one("step", "ms", [r.step_ms for r in made]))
        if spec == NONE:
            continue
        pairs = list(zip(made, plain, strict=True))
        rows.append(one("speed_up", "1", [a.speed / b.speed for a, b in pairs], versus=NONE))
        to_end = [a.speed_to_end / b.speed_to_end for a, b in pairs]
        rows.append(one("speed_up_to_end", "1", to_end, versus=NONE))
        rows.append(one("kappa", "tokens/step", [r.kappa for r in made]))
        rows.append(one("drafted", "tokens/step", [r.drafted for r in made]))
        for place in range(len(made[0].kept)):
            rows.append(one(f"kept_{place + 1}", "share", [r.kept[place] for r in made]))
        same = [sum(x == y for x, y in zip(a.texts, b.texts, strict=True)) for a, b in pairs]
        rows.append(one("same_text", "share", [n / len(plain[0].texts) for n in same], versus=NONE))
    return rows


def _write(
    llm: LLM,
    spec: str,
    cache: str,
    fixed: int | None,
    prompts: Sequence[list[int]],
    new_tokens: int,
) -> Round:
    drafter = make_drafter(spec, llm.model)
    machine = Engine(llm.model, parse_cache(cache), EngineConfig(draft_tokens=fixed), drafter)
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    requests = [machine.submit(p, params) for p in prompts]
    taken = list(machine.run())
    # The step that ends a sequence was still taken by the full batch.
    full = 1 + sum(s.running == len(prompts) for s in taken)
    steps = [s for s in taken if s.prompt_tokens == 0]
    whole = [s for s in taken[:full] if s.prompt_tokens == 0]
    if not whole:
        raise ConfigError(f"new_tokens {new_tokens} are written before all prompts are read")
    told = [r.metrics for r in requests]
    passes = sum(m.steps for m in told)
    kept: list[float] = []
    if machine.speculation:
        counts = zip(machine.speculation.kept, machine.speculation.tried, strict=True)
        kept = [k / t if t else 0.0 for k, t in counts]
    return Round(
        speed=_speed(whole),
        speed_to_end=_speed(steps),
        step_ms=1e3 * sum(s.seconds for s in whole) / len(whole),
        kappa=sum(m.generated_tokens for m in told) / passes,
        kept=kept,
        drafted=sum(m.drafted_tokens for m in told) / passes,
        texts=[r.generated for r in requests],
    )


def _speed(steps: Sequence[Step]) -> float:
    return sum(s.generated_tokens for s in steps) / sum(s.seconds for s in steps)


def _prompts(llm: LLM, data: Path, count: int, context: int, seed: int) -> list[list[int]]:
    if context:
        windows = read_windows(data, llm.model, count, context, seed)
        texts = [f"{llm.tokenizer.decode(w)}\n\nSummarize the text above." for w in windows]
    else:
        texts = [row["turns"][0] for row in read_rows(find(data, "spec_bench/question"))]
        random.Random(seed).shuffle(texts)
        if len(texts) < count:
            raise InputError(f"Spec-Bench has only {len(texts)} questions here, not {count}")
    return [llm.chat_ids([{"role": "user", "content": text}]) for text in texts[:count]]


def summary(rows: Sequence[Row]) -> list[Row]:
    """The rows a table has room for."""
    return [r for r in rows if not r["metric"].startswith("kept_")]


def curves(rows: Sequence[Row]) -> list[Row]:
    """The rows to draw: speed-up over the batch, a panel a context."""
    return [r for r in rows if r["metric"] == "speed_up"]

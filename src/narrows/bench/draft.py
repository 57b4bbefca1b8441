"""``narrows bench draft``: what drafting gains, against the same engine without it.

Every round is a queue of requests that are answered so many at a time, until a text ends by itself
or is as long as may be. Plain decoding writes the texts first, untimed; then it and the drafters
are told them, since in bfloat16 steps of several tokens round differently, so that texts part, and
some are guessed more easily. All write them abreast: the one that is furthest behind takes the next
step. What slows the machine for a while so slows all of them in the same part of the same texts.
Peers follow, another one first in each round. A drafter keeps its engine, and so what it has
learnt, from one round of a batch size to the next.

A ``speed`` counts the steps in which the whole batch was decoding and nothing else happened;
``overall`` counts all, from the first prompt read to the last text alone. ``mean_speed_up`` and
``mean_speed_up_overall`` are means over rounds of either, against a combination's parts, too.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from narrows.bench.contestants import Transformers
from narrows.bench.metrics import bootstrap
from narrows.bench.progress import Progress
from narrows.bench.prose import read_windows
from narrows.bench.provenance import provenance
from narrows.bench.report import Row, repeated_row, row, with_provenance
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import Asked, Draft, Drafter, Kept, Offer
from narrows.data import find, locate, read_rows
from narrows.draft.specs import NONE, make_drafter
from narrows.engine.engine import Engine, Step
from narrows.engine.memory import settle
from narrows.engine.sampling import Sampler
from narrows.errors import ConfigError, InputError
from narrows.llm import LLM
from narrows.train.prompts import BENCHMARK

COLUMNS = ("context", "batch", "method", "versus")
"""Columns of the printed table."""

PEER_MOST = 10
"""Tokens a draft of transformers' prompt lookup, as its documentation has it."""


@dataclass(frozen=True, slots=True)
class Round:
    """One queue answered: tokens per second, of the full batch and over all; milliseconds a step,
    and the share of them that drafting takes; tokens committed and guesses verified a step and
    sequence; shares of guesses kept by place; and the texts."""

    speed: float
    overall: float
    step_ms: float
    drafting: float
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
    new_tokens: int = 192,
    requests: int = 4,
    rounds: int = 3,
    prefill_chunk: int = 512,
    fixed: int | None = None,
    cache: str = "dense",
    peers: bool = False,
    dtype: str = "bfloat16",
    device: str | None = None,
    seed: int = 0,
    quick: bool = False,
    show_progress: bool = True,
) -> list[Row]:
    """Measure and return rows, provenance included; medians over rounds with min-max.

    Args:
        drafters: specs; each is compared with no drafter.
        batches: prompts answered at a time.
        contexts: 0 asks Spec-Bench's questions as they are; otherwise a summary of a text of
            that many tokens, another one for each prompt.
        new_tokens: written for a prompt at most.
        requests: different prompts of a round for each one that is answered at a time.
        rounds: measured, on other prompts each as long as there are any, by the same engines, as a
            server goes on; one more before them, on yet others, is not counted.
        prefill_chunk: prompt tokens of a step at most. Where the first of many long prompts are
            answered before the last is read, only larger chunks let all decode together.
        fixed: guesses verified a step; None lets the engine choose.
        cache: spec of the target's cache.
        peers: at batch 1, transformers' own ``generate`` too, and its prompt lookup against that.
        quick: tiny sizes, to see that all of it works.

    Raises ConfigError, InputError or ModelError.
    """
    if not drafters or min(batches, default=0) < 1 or min(contexts, default=-1) < 0:
        raise ConfigError("give drafters, batches of at least 1 and contexts of at least 0 tokens")
    if min(new_tokens - 3, requests, rounds, prefill_chunk) < 1:
        raise ConfigError(
            "new_tokens must be at least 4, requests, rounds and prefill_chunk at least 1"
        )
    if quick:
        batches, contexts, new_tokens, requests, rounds = batches[:1], contexts[:1], 8, 2, 1
    folder = locate(data)
    llm = LLM(model, dtype=dtype, device=device, draft=NONE)
    for spec in drafters:
        make_drafter(spec, llm.model)  # refuse a wrong one before hours of work
    theirs = []
    if peers:
        theirs = [Transformers(model, dtype, device, lookup=most) for most in (None, PEER_MOST)]
    settle()  # a collection would take a twentieth of somebody's round
    rows: list[Row] = []
    with Progress("batches", visible=show_progress) as progress:
        progress.expect(len(batches) * len(contexts))
        for context in contexts:
            texts = _prompts(llm, folder, max(batches) * requests, rounds + 1, context, seed)
            for batch in batches:
                limits = EngineConfig(
                    draft_tokens=fixed, max_sequences=batch, prefill_chunk=prefill_chunk
                )
                writers = {
                    spec: _Writer(llm, spec, cache, limits, new_tokens)
                    for spec in (NONE, *drafters)
                }
                sides: dict[str, list[Round]] = defaultdict(list)
                for number in range(-1, rounds):
                    count = batch * requests
                    first = number % (rounds + 1) * count
                    prompts = [texts[i % len(texts)] for i in range(first, first + count)]
                    plain = _abreast({NONE: writers[NONE]}, prompts)[NONE]
                    made = _abreast(writers, prompts, plain.texts)
                    if batch == 1:
                        for contestant in theirs[:: -1 if number % 2 else 1]:
                            made[contestant.name] = _write_theirs(contestant, new_tokens, prompts)
                    if number >= 0:
                        for name, one in made.items():
                            sides[name].append(one)
                where = {
                    "context": context,
                    "batch": batch,
                    "cache": cache,
                    "dtype": dtype,
                    "prefill_chunk": prefill_chunk,
                }
                rows += _rows(model, sides, where)
                progress.advance()
    return with_provenance(rows, provenance(seed))


def _rows(model: str, sides: dict[str, list[Round]], where: dict[str, Any]) -> list[Row]:
    rows = []
    for spec, made in sides.items():
        base = Transformers.name if spec.startswith(Transformers.name) else NONE
        plain = sides[base]

        def one(metric: str, unit: str, values: list[float], spec: str = spec, **more: str) -> Row:
            return repeated_row("draft", spec, model, metric, unit, values, **where, **more)

        rows.append(one("speed", "tokens/s", [r.speed for r in made]))
        rows.append(one("step", "ms", [r.step_ms for r in made]))
        if spec == base:
            continue
        pairs = list(zip(made, plain, strict=True))
        rows.append(one("speed_up", "1", [a.speed / b.speed for a, b in pairs], versus=base))
        overall = [a.overall / b.overall for a, b in pairs]
        rows.append(one("speed_up_overall", "1", overall, versus=base))
        for other in (base, *(part for part in spec.split("+") if part != spec and part in sides)):
            for metric, of in (("mean_speed_up", "speed"), ("mean_speed_up_overall", "overall")):
                both = zip(made, sides[other], strict=True)
                ratios = [getattr(a, of) / getattr(b, of) for a, b in both]
                rows.append(
                    row(
                        "draft",
                        method=spec,
                        model=model,
                        metric=metric,
                        unit="1",
                        value=fmean(ratios),
                        interval=bootstrap(ratios),
                        n=len(ratios),
                        versus=other,
                        **where,
                    )
                )
        rows.append(one("drafting", "share", [r.drafting for r in made]))
        rows.append(one("kappa", "tokens/step", [r.kappa for r in made]))
        rows.append(one("drafted", "tokens/step", [r.drafted for r in made]))
        for place in range(len(made[0].kept)):
            rows.append(one(f"kept_{place + 1}", "share", [r.kept[place] for r in made]))
        if base != NONE:
            same = [fmean(x == y for x, y in zip(a.texts, b.texts, strict=True)) for a, b in pairs]
            rows.append(one("same_text", "share", same, versus=base))
    return rows


class _Told(Sampler):
    """Takes the tokens of a text that is known."""

    def __init__(self, text: Sequence[int], vocab_size: int) -> None:
        super().__init__(SamplingParams(), vocab_size, frozenset(), ())
        self.text = text

    def given_best(self, tokens: list[int], generated: Sequence[int]) -> list[int]:
        known = self.text[len(generated) : len(generated) + len(tokens)]
        # A draft may go on behind the end, where nothing is committed any more.
        return [*known, *tokens[len(known) :]]


class _Writer:
    """Answers queues with one engine and one drafter, which so know what earlier ones showed."""

    def __init__(
        self, llm: LLM, spec: str, cache: str, limits: EngineConfig, new_tokens: int
    ) -> None:
        drafter = make_drafter(spec, llm.model)
        self.clock = _Clocked(drafter) if drafter else None
        self.engine = Engine(llm.model, parse_cache(cache), limits, self.clock)
        self.batch = limits.max_sequences
        self.params = SamplingParams(max_tokens=new_tokens)

    def begin(self, prompts: Sequence[list[int]], texts: Sequence[list[int]] | None) -> None:
        """Queue ``prompts``; with ``texts``, those are the answers."""
        self._known = self._counts()
        self._requests = [self.engine.submit(p, self.params) for p in prompts]
        for request, text in zip(self._requests, texts or (), strict=bool(texts)):
            request.sampler = _Told(text, self.engine.model.shape.vocab_size)
        self._steps: list[Step] = []
        self._whole: list[Step] = []
        self._full, self._spent = False, 0.0
        self.passed = 0
        """Tokens read and written since."""

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def step(self) -> None:
        """Take a step of the engine."""
        before = self._drafting()
        step = self.engine.step()
        self.passed += step.prompt_tokens + step.generated_tokens
        self._steps.append(step)
        full = step.running == self.batch
        # The step that ends a sequence was still taken by the full batch.
        if step.prompt_tokens == 0 and (self._full or full):
            self._whole.append(step)
            self._spent += self._drafting() - before
        self._full = full

    def made(self) -> Round:
        """What became of the queue. Raises ConfigError if the whole batch never decoded."""
        whole = self._whole
        if not whole:
            raise ConfigError(
                f"{self.batch} prompts are never decoded together: {self.params.max_tokens} "
                "tokens are written, or a text ends, while some are still being read; give a "
                "larger prefill_chunk, or more new_tokens"
            )
        told = [r.metrics for r in self._requests]
        passes = sum(m.steps for m in told)
        counts = zip(self._counts(), self._known, strict=True)
        kept = [(a - c, b - d) for (a, b), (c, d) in counts]
        seconds = sum(s.seconds for s in whole)
        return Round(
            speed=_speed(whole),
            overall=_speed(self._steps),
            step_ms=1e3 * seconds / len(whole),
            drafting=self._spent / seconds,
            kappa=sum(m.generated_tokens for m in told) / passes,
            kept=[stayed / tried if tried else 0.0 for stayed, tried in kept],
            drafted=sum(m.drafted_tokens for m in told) / passes,
            texts=[r.generated for r in self._requests],
        )

    def _drafting(self) -> float:
        return self.clock.seconds if self.clock else 0.0

    def _counts(self) -> list[tuple[int, int]]:
        """By place of a draft, guesses kept and tried so far."""
        speculation = self.engine.speculation
        return list(zip(speculation.kept, speculation.tried, strict=True)) if speculation else []


def _abreast(
    writers: dict[str, _Writer],
    prompts: Sequence[list[int]],
    texts: Sequence[list[int]] | None = None,
) -> dict[str, Round]:
    """What all of ``writers`` at once make of ``prompts``, answered by ``texts`` if given."""
    for writer in writers.values():
        writer.begin(prompts, texts)
    while busy := [writer for writer in writers.values() if writer.busy]:
        min(busy, key=lambda writer: writer.passed).step()
    return {spec: writer.made() for spec, writer in writers.items()}


def _write_theirs(contestant: Transformers, new_tokens: int, prompts: Sequence[list[int]]) -> Round:
    """One prompt after the other, each to ``new_tokens``: their texts do not end by themselves,
    and nobody tells them any."""
    timed = [contestant.generate([prompt], new_tokens) for prompt in prompts]
    texts = [text for one in timed for text in one.tokens]
    steps = [seconds for one in timed for seconds in one.steps_s]
    written = sum(map(len, texts))
    after_first = written - len(prompts)  # the first tokens come with the prompts
    return Round(
        speed=after_first / sum(steps),
        overall=written / sum(one.total_s for one in timed),
        step_ms=1e3 * sum(steps) / len(steps),
        drafting=0.0,
        kappa=after_first / len(steps),
        kept=[],
        drafted=0.0,
        texts=texts,
    )


class _Clocked(Drafter):
    """A drafter, and the seconds it has taken."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.seconds = drafter, 0.0
        self.name, self.most, self.taps = drafter.name, drafter.most, drafter.taps
        self.estimate, self.forget = drafter.estimate, drafter.forget  # type: ignore[method-assign]
        self.wants = drafter.wants  # type: ignore[method-assign]

    def _clocked(self, method: Callable[..., Any], *given: Any) -> Any:
        started = time.perf_counter()
        done = method(*given)
        self.seconds += time.perf_counter() - started
        return done

    def read(self, taps: Tensor, kept: Sequence[Kept]) -> None:
        self._clocked(self.drafter.read, taps, kept)

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        return self._clocked(self.drafter.offer, asked)  # type: ignore[no-any-return]

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        return self._clocked(self.drafter.propose, asked)  # type: ignore[no-any-return]


def _speed(steps: Sequence[Step]) -> float:
    return sum(s.generated_tokens for s in steps) / sum(s.seconds for s in steps)


def _prompts(
    llm: LLM, data: Path, least: int, rounds: int, context: int, seed: int
) -> list[list[int]]:
    """``least`` different prompts for each of as many rounds as there are texts for, in random
    order."""
    if context:
        windows = read_windows(data, llm.model, least * rounds, context, seed, least=least)
        texts = [f"{llm.tokenizer.decode(w)}\n\nSummarize the text above." for w in windows]
    else:
        texts = [row["turns"][0] for row in read_rows(find(data, BENCHMARK))]
        random.Random(seed).shuffle(texts)
        if len(texts) < least:
            raise InputError(f"Spec-Bench has only {len(texts)} questions here, not {least}")
    return [llm.chat_ids([{"role": "user", "content": text}]) for text in texts]


def summary(rows: Sequence[Row]) -> list[Row]:
    """The rows a table has room for."""
    return [r for r in rows if not r["metric"].startswith("kept_")]


def curves(rows: Sequence[Row]) -> list[Row]:
    """The rows to draw: speed-up over the batch against no drafter, a panel a context."""
    plain = (NONE, Transformers.name)
    return [r for r in rows if r["metric"] == "speed_up" and r["versus"] in plain]

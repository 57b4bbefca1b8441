"""``narrows bench engine``: our engine against others on one machine, in one run.

Absolute times say little elsewhere; the rows to compare are the ratios. Rivals take turns within
every repetition, so that a machine that slows down slows both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from narrows.bench.contestants import Contestant, Ours, Prompts, Timing, Transformers
from narrows.bench.limits import added_memory, read_bandwidth, weight_bytes
from narrows.bench.peers import time_vllm
from narrows.bench.progress import Progress
from narrows.bench.provenance import provenance
from narrows.bench.report import Row, repeated_row, row, with_provenance
from narrows.errors import ConfigError
from narrows.model import hub
from narrows.model.flat import DTYPES

COLUMNS = ("dtype", "batch", "prompt_tokens", "method", "versus")
"""Columns of the printed table."""


def run(
    *,
    model: str = "smollm2-135m",
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    batches: Sequence[int] = (1, 8, 32),
    shortest: int = 16,
    longest: int = 1000,
    new_tokens: int = 64,
    prefill: Sequence[int] = (1000, 4000, 8000),
    repeats: int = 3,
    cache: str = "dense",
    device: str | None = None,
    vllm: bool = False,
    seed: int = 0,
    quick: bool = False,
    show_progress: bool = True,
) -> list[Row]:
    """Measure and return rows (see ``report.row``), provenance included.

    Prompts are random token ids. Measured, as medians with min-max over ``repeats``: time of a
    decoding step and tokens per second for each batch of prompts of unequal length, time to the
    first token and prefill speed for one prompt, peak memory added by the longest one, share of
    the memory roofline, and every ratio to ``generate`` of transformers.

    Args:
        model: what every engine runs.
        dtypes: each is a comparison of its own.
        batches: prompts at a time; lengths spread evenly from ``shortest`` to ``longest``.
        new_tokens: written for every prompt.
        prefill: prompt lengths for time to first token; those beyond the window are left out.
        repeats: rounds; one more before them is not counted.
        cache: cache spec of our engine.
        device: None takes CUDA where there is one.
        vllm: also time vLLM's CPU build, bfloat16, in an environment of its own.
        seed: of the prompts.
        quick: tiny sizes, to see that all of it works.

    Raises ConfigError or ModelError.
    """
    if quick:
        batches, longest, shortest, new_tokens = (1, 3), 12, 4, 4
        prefill, repeats = (16,), 1
    _check(dtypes, batches, shortest, longest, new_tokens, repeats)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bandwidth = read_bandwidth(place, size=1 << (20 if quick else 30))
    rows = [repeated_row("engine", "memory", model, "read_bandwidth", "GB/s", [bandwidth / 1e9])]
    with Progress("rounds", visible=show_progress) as progress:
        progress.expect(len(dtypes) * (len(batches) + len(prefill) + 1))
        for dtype in dtypes:
            ours = Ours(model, dtype, device, cache)
            window = ours.llm.model.shape.max_tokens
            bench = _Duel(model, dtype, ours, Transformers(model, dtype, device), repeats)
            for size in batches:
                prompts = _prompts(ours, size, shortest, longest, seed)
                rows += bench.decode(prompts, new_tokens, bandwidth)
                progress.advance()
            for length in prefill:
                if length < window:
                    rows += bench.prefill(_prompts(ours, 1, length, length, seed))
                progress.advance()
            length = min(max(prefill), window - 1)
            rows += bench.memory(_prompts(ours, 1, length, length, seed))
            progress.advance()
            if vllm and dtype == "bfloat16":
                many = [_prompts(ours, size, shortest, longest, seed) for size in batches]
                rows += _against_vllm(bench, many, new_tokens)
    return with_provenance(rows, provenance(seed))


class _Duel:
    """Our engine and one rival on the same model, precision and prompts."""

    def __init__(self, model: str, dtype: str, ours: Ours, rival: Contestant, repeats: int) -> None:
        self.model = model
        self.dtype = dtype
        self.ours = ours
        self.rival = rival
        self.repeats = repeats
        self.throughput: dict[int, list[float]] = {}

    def decode(self, prompts: Prompts, new_tokens: int, bandwidth: float) -> list[Row]:
        """Step times, throughput, their ratios, and the share of the roofline."""
        a, b = self._rounds(prompts, new_tokens)
        where = {"batch": len(prompts), "dtype": self.dtype, "new_tokens": new_tokens}
        # In milliseconds; a batch may finish reading its prompts only with its first token.
        steps = [[1e3 * median(t.steps_s) for t in side] for side in (a, b)]
        speeds = [[len(prompts) * new_tokens / t.total_s for t in side] for side in (a, b)]
        self.throughput[len(prompts)] = speeds[0]
        rows = self._pair("decode_step", "ms", steps, faster="rival/ours", **where)
        rows += self._pair("throughput", "tokens/s", speeds, faster="ours/rival", **where)
        floor = 1e3 * weight_bytes(self.ours.llm.model.model) / bandwidth
        share = [floor / ms for ms in steps[0]]
        rows.append(self.one(self.ours.name, "roofline_share", "share", share, **where))
        same = [x == y for x, y in zip(a[0].tokens, b[0].tokens, strict=True)]
        agreed = [sum(same) / len(same)]
        rows.append(
            self.one(self.ours.name, "same_text", "share", agreed, versus=self.rival.name, **where)
        )
        return rows

    def prefill(self, prompts: Prompts) -> list[Row]:
        """Time to the first token of one prompt, and tokens read per second."""
        length = len(prompts[0])
        where = {"prompt_tokens": length, "batch": 1, "dtype": self.dtype}
        taken = [[t.total_s for t in side] for side in self._rounds(prompts, 1)]
        rows = self._pair("first_token", "s", taken, faster="rival/ours", **where)
        speeds = [[length / s for s in side] for side in taken]
        for name, values in zip((self.ours.name, self.rival.name), speeds, strict=True):
            rows.append(self.one(name, "prefill_speed", "tokens/s", values, **where))
        return rows

    def memory(self, prompts: Prompts) -> list[Row]:
        """Peak memory added while one long prompt is read."""
        device = self.ours.llm.model.shape.device
        where = {"prompt_tokens": len(prompts[0]), "batch": 1, "dtype": self.dtype}
        rows = []
        for side in (self.ours, self.rival):
            added = added_memory(lambda side=side: side.generate(prompts, 1), device)  # type: ignore[misc]
            if added is not None:
                rows.append(self.one(side.name, "added_memory", "MiB", [added / 2**20], **where))
        return rows

    def _rounds(self, prompts: Prompts, new_tokens: int) -> tuple[list[Timing], list[Timing]]:
        pairs = [
            (self.ours.generate(prompts, new_tokens), self.rival.generate(prompts, new_tokens))
            for _ in range(self.repeats + 1)
        ][1:]
        return [a for a, _ in pairs], [b for _, b in pairs]

    def _pair(
        self, metric: str, unit: str, values: list[list[float]], *, faster: str, **where: Any
    ) -> list[Row]:
        """Rows of both sides and of our advantage within each round: above 1 we are faster."""
        ours, theirs = values
        ratio = [
            y / x if faster == "rival/ours" else x / y for x, y in zip(ours, theirs, strict=True)
        ]
        return [
            self.one(self.ours.name, metric, unit, ours, **where),
            self.one(self.rival.name, metric, unit, theirs, **where),
            self.one(
                self.ours.name, f"{metric}_advantage", "1", ratio, versus=self.rival.name, **where
            ),
        ]

    def one(self, name: str, metric: str, unit: str, values: list[float], **where: Any) -> Row:
        """A row of one value a round."""
        return repeated_row("engine", name, self.model, metric, unit, values, **where)


def _against_vllm(bench: _Duel, batches: Sequence[Prompts], new_tokens: int) -> list[Row]:
    """Throughput and step time of vLLM on the same prompts, and our advantage in throughput. It
    runs in another process, after ours, so the ratio is of medians."""
    measured = time_vllm(
        hub.resolve(bench.model),
        batches,
        dtype=bench.dtype,
        new_tokens=new_tokens,
        repeats=bench.repeats,
        max_tokens=max(len(p) for batch in batches for p in batch) + new_tokens,
    )
    rows = []
    for prompts, seconds in zip(batches, measured, strict=True):
        where = {"batch": len(prompts), "dtype": bench.dtype, "new_tokens": new_tokens}
        speed = [len(prompts) * new_tokens / s for s in seconds["total_s"]]
        steps = [
            1e3 * (s - first) / (new_tokens - 1)
            for s, first in zip(seconds["total_s"], seconds["first_s"], strict=True)
        ]
        ours = bench.throughput[len(prompts)]
        rows += [
            bench.one("vllm-cpu", "throughput", "tokens/s", speed, **where),
            bench.one("vllm-cpu", "decode_step", "ms", steps, **where),
            row(
                "engine",
                method=bench.ours.name,
                model=bench.model,
                metric="throughput_advantage",
                unit="1",
                value=median(ours) / median(speed),
                interval=(min(ours) / max(speed), max(ours) / min(speed)),
                spread="min-max",
                n=len(speed),
                versus="vllm-cpu",
                **where,
            ),
        ]
    return rows


def curves(rows: Sequence[Row]) -> list[Row]:
    """The rows to draw: the time of a decoding step over the batch, a panel a precision."""
    return [r for r in rows if r["metric"] == "decode_step"]


def _prompts(ours: Ours, count: int, shortest: int, longest: int, seed: int) -> list[list[int]]:
    """``count`` prompts of random tokens, their lengths spread evenly; one has the mean length."""
    chance = random.Random(seed)
    vocabulary = ours.llm.model.shape.vocab_size
    if count == 1:
        lengths = [(shortest + longest) // 2]
    else:
        lengths = [shortest + i * (longest - shortest) // (count - 1) for i in range(count)]
    chance.shuffle(lengths)
    return [[chance.randrange(vocabulary) for _ in range(n)] for n in lengths]


def _check(
    dtypes: Sequence[str],
    batches: Sequence[int],
    shortest: int,
    longest: int,
    new_tokens: int,
    repeats: int,
) -> None:
    wrong = [d for d in dtypes if d not in DTYPES]
    if wrong or not dtypes:
        raise ConfigError(f"dtypes: give some of {', '.join(DTYPES)} (given: {', '.join(wrong)})")
    if not batches or min(batches) < 1:
        raise ConfigError("batches: give at least one size, each at least 1")
    if not 1 <= shortest <= longest:
        raise ConfigError("shortest: must be at least 1 and at most longest")
    if new_tokens < 3 or repeats < 1:
        raise ConfigError("new_tokens must be at least 3, to time a step, and repeats at least 1")

"""What compressing costs: time, as a multiple of one plain forward pass over the same tokens, and
memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from narrows.bench.arms import parse_spec
from narrows.bench.limits import added_memory
from narrows.bench.peers import time_llmlingua
from narrows.bench.prose import read_prose
from narrows.bench.report import Row, repeated_row
from narrows.cache.dense import DensePolicy
from narrows.compression import make_compressor
from narrows.contracts import Document
from narrows.model.flat import FlatModel
from narrows.retrieve.passages import split_passages

TOKENS = 4000
LONG_TOKENS = 20_000
"""Of the text whose compression's memory is measured."""
SPECS = (
    "dac:stages=5",
    "dac:stages=5,attn_refresh=once",
    "dac-static",
    "dac-sweep",
    "selective-context",
    "llmlingua",
)
KEEP = (0.5, 0.2)
FORWARD = "forward pass"
ITERATIVE = "llmlingua"
RELEASED = "llmlingua 0.2.2"
PASSAGE = 900
"""Characters of a passage that the released package is given: about 200 tokens."""


def overhead_rows(
    model: FlatModel, data: Path, *, repeats: int, dtype: str, released: Path | None = None
) -> list[Row]:
    """Seconds of each method and of a forward pass with all logits, over TOKENS tokens of prose,
    interleaved ``repeats`` times. ``released``, the model's folder, adds the package llmlingua on
    the same model, in an environment of its own.

    Rows of the seconds and of the ratios within a repetition, medians with min-max. Ratios are
    over the forward pass and over the iterative baseline, ours and the released one."""
    text = read_prose(data, model, TOKENS)
    rows: list[Row] = []
    for keep in KEEP:
        target = round(keep * len(text.ids))
        jobs = {FORWARD: timed(lambda: plain_pass(model, text.ids))}
        for spec in SPECS:
            jobs[spec] = timed(_job(spec, model, text.text, target))
        kept: list[float] = []
        if released:
            jobs[RELEASED] = _released(released, text.text, target, dtype, kept)
        seconds = interleave(jobs, repeats)
        where = {
            "part": "time",
            "budget": f"{keep:g}",
            "tokens": len(text.ids),
        }
        rows += [
            repeated_row("compress", spec, model.name, "time", "s", taken, **where)
            for spec, taken in seconds.items()
        ]
        if released:
            # The first round is not counted, nor is what it kept.
            rows.append(
                repeated_row("compress", RELEASED, model.name, "kept", "tokens", kept[1:], **where)
            )
        for spec in jobs:
            for other in (FORWARD, ITERATIVE, RELEASED):
                if other in jobs and spec not in (other, FORWARD):
                    shares = [a / b for a, b in zip(seconds[spec], seconds[other], strict=True)]
                    rows.append(
                        repeated_row(
                            "compress",
                            spec,
                            model.name,
                            "time_ratio",
                            "1",
                            shares,
                            versus=other,
                            **where,
                        )
                    )
    return rows


def memory_rows(model: FlatModel, data: Path) -> list[Row]:
    """Peak memory that compressing LONG_TOKENS tokens to a fifth adds to what the process held."""
    text = read_prose(data, model, LONG_TOKENS)
    job = _job(SPECS[0], model, text.text, len(text.ids) // 5)
    added = added_memory(job, model.shape.device)
    if added is None:
        return []
    where = {"part": "time", "budget": "0.2", "tokens": len(text.ids)}
    mebibytes = [added / 2**20]
    return [
        repeated_row("compress", SPECS[0], model.name, "added_memory", "MiB", mebibytes, **where)
    ]


def plain_pass(model: FlatModel, ids: list[int]) -> None:
    """Read ``ids`` in one flat pass with dense caches and make every row's logits."""
    device = model.shape.device
    with torch.inference_mode():
        model.logits(model.read(ids, DensePolicy().build(model.shape)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def interleave(jobs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each job says it took in each of ``repeats`` rounds; a round runs every job
    once, so that a machine that slows down slows all of them. One round before is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            seconds = job()
            if number:
                taken[name].append(seconds)
    return taken


def timed(job: Callable[[], object]) -> Callable[[], float]:
    """``job``, returning the seconds it took."""

    def run() -> float:
        started = time.perf_counter()
        job()
        return time.perf_counter() - started

    return run


def _job(spec: str, model: FlatModel, text: str, target: int) -> Callable[[], object]:
    method, options = parse_spec(spec)
    compressor = make_compressor(method, model, **options)
    return lambda: compressor.compress(text, target_tokens=target)


def _released(
    folder: Path, text: str, target: int, dtype: str, kept: list[float]
) -> Callable[[], float]:
    """Seconds of the released package; the tokens it kept are added to ``kept``."""
    passages = [p.text for p in split_passages(Document("", text), PASSAGE)]

    def run() -> float:
        seconds, left = time_llmlingua(folder, passages, target, dtype=dtype)
        kept.append(left)
        return seconds

    return run

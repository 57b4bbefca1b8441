"""What compressing costs: time, as a multiple of one plain forward pass over the same tokens, and
memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from narrows.bench.arms import parse_spec
from narrows.bench.limits import added_memory
from narrows.bench.prose import read_prose
from narrows.bench.report import Row, repeated_row
from narrows.cache.dense import DensePolicy
from narrows.compression import make_compressor
from narrows.contracts import FlatBatch
from narrows.model.flat import FlatModel

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


def overhead_rows(model: FlatModel, data: Path, *, repeats: int) -> list[Row]:
    """Seconds of each method and of a forward pass with all logits, over TOKENS tokens of prose,
    interleaved ``repeats`` times.

    Rows of the seconds and of the ratios within a repetition, medians with min-max. Ratios are
    over the forward pass and over the iterative baseline."""
    text = read_prose(data, model, TOKENS)
    rows: list[Row] = []
    for keep in KEEP:
        jobs: dict[str, Callable[[], object]] = {FORWARD: lambda: plain_pass(model, text.ids)}
        for spec in SPECS:
            jobs[spec] = _job(spec, model, text.text, round(keep * len(text.ids)))
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
        for spec in SPECS:
            for other in (FORWARD, SPECS[-1]):
                if spec != other:
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
    batch = FlatBatch([(0, len(ids))], [DensePolicy().build(model.shape)])
    with torch.inference_mode():
        places = torch.arange(len(ids), device=device)
        model.logits(model.hidden(torch.tensor(ids, device=device), places, batch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def interleave(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each job in each of ``repeats`` rounds; a round runs every job once, so that a
    machine that slows down slows all of them. One round before is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if number:
                taken[name].append(time.perf_counter() - started)
    return taken


def _job(spec: str, model: FlatModel, text: str, target: int) -> Callable[[], object]:
    method, options = parse_spec(spec)
    compressor = make_compressor(method, model, **options)
    return lambda: compressor.compress(text, target_tokens=target)

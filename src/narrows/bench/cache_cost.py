"""What a cache costs: bytes held, time of a prompt and of a decoding step, memory beyond what is
held.

Bytes and time of a step do not depend on what the keys and values are, so random ones stand for a
prompt; what reading a prompt costs is that of a real one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from narrows.bench.cache_subjects import Reader, Subject
from narrows.bench.limits import added_memory
from narrows.bench.overhead import interleave, timed
from narrows.bench.report import Row, repeated_row, row

WARM_UP = 4
"""Decoding steps before any is timed."""


def byte_rows(
    subjects: Sequence[Subject], lengths: Sequence[int], elements: int, *, model: str, **named: Any
) -> list[Row]:
    """Rows of the bytes of distinct storages held after a prompt of each length, as bits an
    element too. ``elements`` are the numbers a token's keys and values have in all layers."""
    rows = []
    for subject in subjects:
        for length in lengths:
            held = subject.held(subject.fill(length, seed=0))
            for metric, unit, value in (
                ("held_bytes", "B", float(held)),
                ("true_bits", "bits/element", 8 * held / (length * elements)),
                ("nominal_bits", "bits/element", subject.nominal_bits),
            ):
                rows.append(
                    row(
                        "cache",
                        **named,
                        part="bytes",
                        method=subject.method,
                        engine=subject.engine,
                        model=model,
                        length=length,
                        metric=metric,
                        unit=unit,
                        value=value,
                        interval=(value, value),
                        spread="exact",
                        n=1,
                    )
                )
    return rows


def time_rows(
    subjects: Sequence[Subject],
    length: int,
    versus: Sequence[str],
    *,
    rounds: int,
    steps: int,
    seed: int,
    model: str,
    **named: Any,
) -> list[Row]:
    """Rows of the time of a decoding step behind ``length`` tokens: the mean of ``steps`` steps,
    median over rounds in which the subjects take turns; the slowest single step, which is where
    a residual is compressed; and how many times faster than each of ``versus`` within a round.
    Of ours also the seconds that compressing the prompt took, once."""
    turns: list[tuple[Subject, Reader]] = []
    rows = []
    for subject in subjects:
        turns.append((subject, subject.fill(length, seed)))
        if subject.compressing_s:
            rows.append(
                repeated_row(
                    "cache",
                    subject.method,
                    model,
                    "compressing",
                    "s",
                    [subject.compressing_s],
                    **{**named, "part": "time", "engine": subject.engine, "length": length},
                )
            )
    for subject, reader in turns:
        _time_steps(subject, reader, WARM_UP)
    taken: dict[str, list[list[float]]] = {s.method: [] for s in subjects}
    for _ in range(rounds):
        for subject, reader in turns:
            taken[subject.method].append(_time_steps(subject, reader, steps))
        turns = turns[1:] + turns[:1]  # nobody always comes after the same one
    means = {method: [fmean(each) for each in many] for method, many in taken.items()}
    for subject in subjects:
        name = subject.method
        where = {**named, "part": "time", "engine": subject.engine, "length": length}
        slowest = max(max(each) for each in taken[name])
        rows += [
            repeated_row("cache", name, model, "decode_step", "ms", means[name], **where),
            repeated_row("cache", name, model, "slowest_step", "ms", [slowest], **where),
        ]
        rows += _advantages("decode_step", means, name, versus, model=model, **where)
    return rows


def prefill_rows(
    subjects: Sequence[Subject],
    prompt: Sequence[int],
    versus: Sequence[str],
    *,
    rounds: int,
    model: str,
    **named: Any,
) -> list[Row]:
    """Rows of the time to read and compress ``prompt`` and to make the logits behind one more
    token: median over rounds in which the subjects take turns; and how many times faster than
    each of ``versus`` within a round."""
    seconds = interleave({s.method: timed(partial(_begin, s, prompt)) for s in subjects}, rounds)
    taken = {name: [1e3 * each for each in many] for name, many in seconds.items()}
    rows = []
    for subject in subjects:
        name = subject.method
        where = {**named, "part": "time", "engine": subject.engine, "length": len(prompt)}
        rows.append(repeated_row("cache", name, model, "prefill", "ms", taken[name], **where))
        rows += _advantages("prefill", taken, name, versus, model=model, **where)
    return rows


def _begin(subject: Subject, prompt: Sequence[int]) -> None:
    _time_steps(subject, subject.read(prompt), 1)


def _advantages(
    metric: str,
    taken: dict[str, list[float]],
    name: str,
    versus: Sequence[str],
    *,
    model: str,
    **where: Any,
) -> list[Row]:
    """Rows of how many times faster ``name`` was than each of ``versus``, round by round."""
    rows = []
    for other in versus:
        if other != name:
            ratio = [y / x for x, y in zip(taken[name], taken[other], strict=True)]
            told = {**where, "versus": other}
            rows.append(
                repeated_row("cache", name, model, f"{metric}_advantage", "1", ratio, **told)
            )
    return rows


def memory_rows(
    subjects: Sequence[Subject],
    prompt: Sequence[int],
    device: torch.device,
    *,
    steps: int,
    model: str,
    **named: Any,
) -> list[Row]:
    """Rows of the peak memory added while ``prompt`` is read and compressed, and of what
    decoding adds to the peak beyond what is held then."""
    rows = []
    for subject in subjects:
        readers: list[Reader] = []
        calls = {
            "prefill_added_memory": partial(_keep, subject, prompt, readers),
            "decode_added_memory": partial(_decode_first, subject, readers, steps),
        }
        where = {**named, "part": "memory", "engine": subject.engine, "length": len(prompt)}
        for metric, call in calls.items():
            added = added_memory(call, device)
            if added is not None:
                mib = [added / 2**20]
                rows.append(
                    repeated_row("cache", subject.method, model, metric, "MiB", mib, **where)
                )
    return rows


def _keep(subject: Subject, prompt: Sequence[int], readers: list[Reader]) -> None:
    readers.append(subject.read(prompt))


def _decode_first(subject: Subject, readers: list[Reader], steps: int) -> None:
    _time_steps(subject, readers[0], steps)


def _time_steps(subject: Subject, reader: Reader, steps: int) -> list[float]:
    """Milliseconds of each of ``steps`` decoding steps."""
    taken = []
    for number in range(steps):
        started = time.perf_counter()
        logits = subject.step([reader], [number + 1])
        float(logits[0, 0])  # waits for an accelerator
        taken.append(1e3 * (time.perf_counter() - started))
    return taken

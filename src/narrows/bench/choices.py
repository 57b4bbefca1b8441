"""Multiple choice by likelihood: the answer whose tokens are likeliest on average is picked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrows.bench.likelihood import Reader, answer_ids, prompt_ids
from narrows.bench.metrics import bootstrap, paired_bootstrap
from narrows.bench.report import Row, row
from narrows.data import find, read_rows
from narrows.errors import InputError

_ASK = "Question: {}\nAnswer:"
TASKS = {"arc_easy": _ASK, "arc_challenge": _ASK, "openbookqa": "{}", "piqa": _ASK}
"""Prompt of each task; those of OpenBookQA are sentences to be ended."""

ALL = "all"
"""The items of all tasks together, as a task."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One question, with its answers and the place of the right one."""

    task: str
    prompt: str
    answers: tuple[str, ...]
    right: int


def read_choices(data: Path, limit: int) -> list[Choice]:
    """The first ``limit`` items of each task. Raises InputError for data that is missing or
    lacks a field."""
    items = []
    for task, prompt in TASKS.items():
        path = find(data, f"commonsense_mc/{task}")
        for given in itertools.islice(read_rows(path), limit):
            try:
                answers, right = tuple(given["choices"]), given["answer"]
                question = prompt.format(given["question"])
            except KeyError as error:
                raise InputError(f"{path}: a row has no field {error}") from None
            items.append(Choice(task, question, answers, right))
    return items


def solve(
    reader: Reader, items: Sequence[Choice], advance: Callable[[], None] = lambda: None
) -> list[float]:
    """Whether each item's right answer is picked, 1 or 0; ``advance`` is called after each."""
    solved = []
    for item in items:
        prompt = prompt_ids(reader.model, item.prompt)
        nll = [reader.answer_nll(prompt, answer_ids(reader.model, f" {a}")) for a in item.answers]
        solved.append(float(nll.index(min(nll)) == item.right))
        advance()
    return solved


def choice_rows(
    solved: dict[str, list[float]],
    items: Sequence[Choice],
    versus: str,
    *,
    seed: int,
    **named: Any,
) -> list[Row]:
    """Rows of the accuracy of each method in each task and in ALL, and of its difference from the
    method ``versus``, item by item. Intervals draw items."""
    rows = []
    for method, hits in solved.items():
        for task in (*dict.fromkeys(item.task for item in items), ALL):
            at = [i for i, item in enumerate(items) if task in (item.task, ALL)]
            mine, theirs = ([found[i] for i in at] for found in (hits, solved[versus]))
            where = {**named, "part": "choices", "method": method, "task": task, "n": len(at)}
            value, interval = sum(mine) / len(mine), bootstrap(mine, seed=seed)
            rows.append(
                row(
                    "latent",
                    metric="accuracy",
                    unit="share",
                    value=value,
                    interval=interval,
                    **where,
                )
            )
            if method != versus:
                gap, interval = paired_bootstrap(mine, theirs, seed=seed)
                rows.append(
                    row(
                        "latent",
                        metric="accuracy_difference",
                        unit="share",
                        value=gap,
                        interval=interval,
                        versus=versus,
                        **where,
                    )
                )
    return rows

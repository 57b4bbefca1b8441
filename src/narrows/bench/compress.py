"""``narrows bench compress``: what compression costs the answer, method against method.

Every method gets the same budget of the same contexts, in tokens of the source. Measured are the
negative log-likelihood of the gold answer after the compressed prompt (sensitive even with a
small model), whether an answer's text survives, the score of a generated answer, and time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narrows.bench.arms import FULL, NONE, Arm, Budget
from narrows.bench.claims import claim_rows
from narrows.bench.measure import Measurer, gap_rows, mean_rows
from narrows.bench.overhead import memory_rows, overhead_rows
from narrows.bench.progress import Progress
from narrows.bench.provenance import provenance
from narrows.bench.records import Ledger
from narrows.bench.report import Row, with_provenance
from narrows.bench.tasks import Item, load
from narrows.data import locate
from narrows.errors import ConfigError
from narrows.llm import LLM
from narrows.model import hub

METHODS = (
    "dac",
    "dac-static",
    "dac-sweep",
    "selective-context",
    "surprisal-dynamic",
    "llmlingua",
    "random",
    "head",
    "tail",
    "head-tail",
    "extractive",
)
KEEP = (0.5, 0.33, 0.2, 0.1)
PARTS = ("likelihood", "answers", "time", "claims")
LIMITS = {"gsm8k": 100, "lost_in_the_middle": 50, "key_value": 50, "needle": 50}
"""Items of a suite when no limit is given; the rest are read whole."""


def run(
    *,
    model: str = "smollm2-135m",
    data: Path | None = None,
    parts: Sequence[str] = ("likelihood", "time"),
    tasks: Sequence[str] = ("gsm8k", "longbench", "needle"),
    methods: Sequence[str] = METHODS,
    keep: Sequence[float] = KEEP,
    token_budget: int = 2000,
    answer_keep: Sequence[float] = (0.2,),
    limit: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
    records: Path | None = None,
    released: bool = False,
    quick: bool = False,
    show_progress: bool = True,
) -> list[Row]:
    """Measure and return rows (see ``report.row``), provenance included.

    Args:
        model: compresses and answers.
        data: benchmark data; None as ``data.locate``.
        parts: of PARTS. ``answers`` generates at ``answer_keep`` and at ``token_budget``, for
            everything that ``likelihood`` measures anyway; ``time`` compares compressing 4,000
            tokens with a plain forward pass; ``claims`` checks five statements about DAC.
        tasks: suites of ``tasks.TASKS``.
        methods: specs, ``name`` or ``name:option=value,...``; the first is compared with each of
            the others.
        keep: shares of the context kept, for contexts that fit the window whole.
        token_budget: tokens kept of every context longer than that.
        limit: items a suite (LongBench: a task); None takes LIMITS.
        dtype: of the model.
        seed: of exemplars, random deletion and bootstrap.
        released: time the package llmlingua too, in an environment of its own.
        records: a file that remembers each item, so that a run can be taken up again.
        quick: two items a suite, one share, one repetition: to see that all of it works.

    Raises ConfigError, InputError or ModelError.
    """
    _check(parts, methods, keep, token_budget)
    if quick:
        limit, keep, answer_keep = 2, keep[:1], keep[:1]
    folder = locate(data)
    suites = {n: load(n, folder, limit=limit or LIMITS.get(n), seed=seed) for n in tasks}
    ledger = Ledger(records)
    llm = LLM(model, dtype=dtype, device=device, draft="none")
    rows: list[Row] = []
    with Progress("items", visible=show_progress) as progress:
        measurer = Measurer(llm, dtype=dtype, seed=seed, ledger=ledger, on_item=progress.advance)
        if {"likelihood", "answers"} & set(parts):
            generate = set(answer_keep) if "answers" in parts else None
            grid = _Grid(measurer, methods, keep, token_budget, generate)
            progress.expect(sum(grid.size(items) for items in suites.values()))
            for name, items in suites.items():
                rows += grid.rows(name, items)
        if "time" in parts:
            place = hub.resolve(model) if released else None
            rows += overhead_rows(
                llm.model, folder, repeats=1 if quick else 3, dtype=dtype, released=place
            )
            rows += memory_rows(llm.model, folder)
        if "claims" in parts:
            rows += claim_rows(measurer, folder, quick=quick)
    return with_provenance(rows, {"dtype": dtype, **provenance(seed)})


def summary(rows: Sequence[Row]) -> list[Row]:
    """The rows a table has room for: whole suites, and what a reader asks first."""
    first = {"answer_nll", "answer_nll_difference", "answer_score", "answer_survival"}
    return [r for r in rows if r.get("part") or (r["metric"] in first and r["suite"] == r["task"])]


def curves(rows: Sequence[Row]) -> list[Row]:
    """The rows to draw: likelihood over the share kept, a panel a suite. A budget in tokens is
    no share, and applies to other items."""
    return [
        r
        for r in rows
        if r["metric"] == "answer_nll"
        and r["suite"] == r["task"]
        and r["budget"][0].isdigit()
        and not r["budget"].endswith("tokens")
    ]


COLUMNS = ("part", "task", "method", "versus", "budget")
"""Columns of the printed table."""


class _Grid:
    """Every method at every budget, over one suite at a time.

    ``generate`` holds the shares at which answers are generated too; None generates none.
    """

    def __init__(
        self,
        measurer: Measurer,
        methods: Sequence[str],
        keep: Sequence[float],
        token_budget: int,
        generate: set[float] | None,
    ) -> None:
        self.measurer = measurer
        model = measurer.llm.model
        # Built first, so that a wrong name fails before hours of work.
        self.arms = [Arm(spec, model) for spec in methods]
        self.ends = [Arm(FULL, model), Arm(NONE, model)]
        self.keep = keep
        self.token_budget = token_budget
        self.generate = generate

    def size(self, items: Sequence[Item]) -> int:
        """Measurements ``rows`` makes of these items."""
        return sum(len(part) * len(arms) for _, part, arms in self._plan(items))

    def rows(self, suite: str, items: Sequence[Item]) -> list[Row]:
        """Means of every method and differences of the first one from the others."""
        rows: list[Row] = []
        for budget, part, arms in self._plan(items):
            measured = [
                self.measurer.measure(part, arm, budget, answers=self._generates(budget))
                for arm in arms
            ]
            for task, chosen in _pools(suite, part):
                named = {"suite": suite, "task": task}
                pooled = [[r for r in records if r.item in chosen] for records in measured]
                for records in pooled:
                    rows += mean_rows(records, **named)
                if not arms[0].is_end:
                    for other in pooled[1:]:
                        rows += gap_rows(pooled[0], other, **named)
        return rows

    def _generates(self, budget: Budget) -> bool:
        if self.generate is None:
            return False
        return budget.keep is None or budget.keep in self.generate

    def _plan(self, items: Sequence[Item]) -> list[tuple[Budget, list[Item], list[Arm]]]:
        """Which items each budget applies to, and the arms measured there."""
        count = self.measurer.llm.tokenizer
        fitting = [i for i in items if self.measurer.fits(i)]
        long = [
            i
            for i in items
            if len(count(i.context, verbose=False)["input_ids"]) > self.token_budget
        ]
        plan: list[tuple[Budget, list[Item], list[Arm]]] = [
            (Budget(), fitting, self.ends[:1]),
            (Budget(), list(items), self.ends[1:]),
        ]
        plan += [(Budget(keep=share), fitting, self.arms) for share in self.keep]
        plan.append((Budget(tokens=self.token_budget), long, self.arms))
        return [(budget, part, arms) for budget, part, arms in plan if part]


def _pools(suite: str, items: Sequence[Item]) -> list[tuple[str, set[str]]]:
    """The suite as a whole and, where it has several, each of its tasks: name and item ids."""
    pools = [(suite, {i.id for i in items})]
    by_task = itertools.groupby(sorted(items, key=lambda i: i.task), key=lambda i: i.task)
    parts = [(task, {i.id for i in part}) for task, part in by_task]
    return pools + parts if len(parts) > 1 else pools


def _check(
    parts: Sequence[str], methods: Sequence[str], keep: Sequence[float], token_budget: int
) -> None:
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise ConfigError(f"unknown part {unknown[0]!r} (known: {', '.join(PARTS)})")
    if not methods or not keep:
        raise ConfigError("give at least one method and one keep ratio")
    wrong: list[Any] = [k for k in keep if not 0 < k < 1]
    if wrong:
        raise ConfigError(f"keep: must lie between 0 and 1 (given: {wrong[0]})")
    if token_budget < 1:
        raise ConfigError(f"token_budget: must be at least 1 (given: {token_budget})")

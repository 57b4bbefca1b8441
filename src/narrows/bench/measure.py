"""Measures items under arms and budgets, and turns the records into rows with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from narrows.bench.arms import Arm, Budget, Shortened
from narrows.bench.likelihood import Reader, answer_ids, prompt_ids
from narrows.bench.metrics import bootstrap, paired_bootstrap
from narrows.bench.records import Key, Ledger, Record
from narrows.bench.report import Row, row
from narrows.bench.tasks import Item
from narrows.config import SamplingParams
from narrows.errors import ConfigError
from narrows.llm import LLM

BLOCK = 16
"""Items measured, answered in one batch and remembered at a time."""


class Measurer:
    """Runs items through one model.

    Args:
        llm: gives likelihoods (its flat model) and answers (its engine).
        dtype: the precision it was loaded in, for the records.
        seed: of the run, for the records.
        ledger: what has been measured already.
        on_item: called with the number of items done, for a progress display.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        dtype: str,
        seed: int,
        ledger: Ledger,
        on_item: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.llm = llm
        self.reader = Reader(llm.model)
        self.dtype = dtype
        self.seed = seed
        self.ledger = ledger
        self.on_item = on_item

    def fits(self, item: Item) -> bool:
        """Whether the whole prompt, the gold answer and a generated one fit the window."""
        model = self.llm.model
        answer = max(len(answer_ids(model, item.gold)), item.max_tokens)
        return len(prompt_ids(model, item.prompt())) + answer <= model.shape.max_tokens

    def measure(
        self, items: Sequence[Item], arm: Arm, budget: Budget, *, answers: bool = False
    ) -> list[Record]:
        """One record an item, in order; with ``answers`` also a generated answer's score."""
        records: dict[Key, Record] = {}
        # Items that share a context in a row, so that it is read once.
        ordered = sorted(items, key=lambda item: item.group)
        for start in range(0, len(ordered), BLOCK):
            block = ordered[start : start + BLOCK]
            missing = []
            for item in block:
                known = self.ledger.get(self._key(item, arm, budget))
                if known is None or (answers and known.score is None):
                    missing.append(item)
                else:
                    records[known.key] = known
            made = self._block(missing, arm, budget, answers)
            self.ledger.add(made)
            records.update((r.key, r) for r in made)
            self.on_item(len(block))
        return [records[self._key(i, arm, budget)] for i in items]

    def _key(self, item: Item, arm: Arm, budget: Budget) -> Key:
        name = self.llm.model.name
        return (name, self.dtype, item.id, item.digest, arm.spec, budget.label, self.seed)

    def _block(
        self, items: Sequence[Item], arm: Arm, budget: Budget, answers: bool
    ) -> list[Record]:
        records, prompts = [], []
        for item in items:
            made = arm.shorten(item, budget)
            prompts.append(prompt_ids(self.llm.model, item.prompt(made.text)))
            records.append(self._record(item, arm, budget, made, prompts[-1]))
        if not answers:
            return records
        return [
            replace(record, prediction=text, score=item.score(text))
            for item, record, text in zip(
                items, records, self._answers(items, prompts), strict=True
            )
        ]

    def _record(
        self, item: Item, arm: Arm, budget: Budget, made: Shortened, prompt: list[int]
    ) -> Record:
        model = self.llm.model
        return Record(
            model=model.name,
            dtype=self.dtype,
            seed=self.seed,
            task=item.task,
            item=item.id,
            content=item.digest,
            group=item.group,
            method=arm.spec,
            budget=budget.label,
            requested=made.requested,
            kept=made.kept,
            context_tokens=made.context_tokens,
            prompt_tokens=len(prompt),
            seconds=made.seconds,
            nll=self.reader.answer_nll(prompt, answer_ids(model, item.gold)),
            survived=item.survives(made.text),
        )

    def _answers(self, items: Sequence[Item], prompts: Sequence[list[int]]) -> list[str]:
        """Greedy answers, in one continuous batch."""
        requests = [
            self.llm.submit(prompt, SamplingParams(max_tokens=item.max_tokens, stop=item.stop))
            for item, prompt in zip(items, prompts, strict=True)
        ]
        for _ in self.llm.engine.run():
            pass
        return [r.completion().text for r in requests]


# ------------------------------------------------------------------------------ records to rows

MEASURES: dict[str, tuple[str, Callable[[Record], float | None]]] = {
    "answer_nll": ("nats/token", lambda r: r.nll),
    "answer_score": ("share", lambda r: r.score),
    "answer_survival": ("share", lambda r: None if r.survived is None else float(r.survived)),
    "requested_tokens": ("tokens", lambda r: float(r.requested)),
    "kept_tokens": ("tokens", lambda r: float(r.kept)),
    "prompt_tokens": ("tokens", lambda r: float(r.prompt_tokens)),
    "compress_time": ("s", lambda r: r.seconds),
}
"""What a record tells: unit and value by metric name."""

SHORTFALL = 0.03
"""Share of the budget a method may leave unused, on average, and still be compared as equal."""


def mean_rows(records: Sequence[Record], **where: Any) -> list[Row]:
    """A row for each measure the records have: its mean over items, with a bootstrap interval
    that draws contexts, not items. The records are of one method and budget."""
    if not records:
        return []
    first = records[0]
    requested, kept = sum(r.requested for r in records), sum(r.kept for r in records)
    rows = []
    for metric, (unit, read) in MEASURES.items():
        pairs = [(value, r.group) for r in records if (value := read(r)) is not None]
        if not pairs:
            continue
        values = [value for value, _ in pairs]
        rows.append(
            row(
                "compress",
                method=first.method,
                model=first.model,
                metric=metric,
                unit=unit,
                value=float(np.mean(values)),
                interval=bootstrap(values, [g for _, g in pairs], seed=first.seed),
                n=len(values),
                budget=first.budget,
                budget_met=kept >= (1 - SHORTFALL) * requested,
                **where,
            )
        )
    return rows


def gap_rows(ours: Sequence[Record], theirs: Sequence[Record], **where: Any) -> list[Row]:
    """Rows of the mean difference ``ours - theirs`` in likelihood and score, paired by item, with
    bootstrap intervals that draw contexts. Raises ConfigError if the items differ, or if the two
    were not given the same budgets."""
    if not ours:
        return []
    if [r.item for r in ours] != [r.item for r in theirs]:
        raise ConfigError("two methods can be compared only over the same items")
    first, other = ours[0], theirs[0]
    if [r.requested for r in ours] != [r.requested for r in theirs]:
        raise ConfigError(f"{first.method} and {other.method} were given different budgets")
    rows = []
    for metric in ("answer_nll", "answer_score"):
        unit, read = MEASURES[metric]
        pairs = [(read(a), read(b), a.group) for a, b in zip(ours, theirs, strict=True)]
        known = [(a, b, g) for a, b, g in pairs if a is not None and b is not None]
        if not known:
            continue
        mean, interval = paired_bootstrap(
            [a for a, _, _ in known],
            [b for _, b, _ in known],
            [g for _, _, g in known],
            seed=first.seed,
        )
        rows.append(
            row(
                "compress",
                method=first.method,
                model=first.model,
                metric=f"{metric}_difference",
                unit=unit,
                value=mean,
                interval=interval,
                n=len(known),
                versus=other.method,
                budget=first.budget,
                kept_tokens=float(np.mean([r.kept for r in ours])),
                kept_tokens_versus=float(np.mean([r.kept for r in theirs])),
                **where,
            )
        )
    return rows

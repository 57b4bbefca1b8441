"""Benchmark items: a context that may be compressed, and what stays verbatim around it."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrows.bench import metrics
from narrows.data import find, read_rows
from narrows.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True)
class Item:
    """One question over one context.

    The prompt is ``before + context + after``; only ``context`` is ever compressed. ``question``
    is what a question-aware compressor may see. ``gold`` is the text whose likelihood is
    measured after the prompt; ``answers`` are what a generated text is scored against by
    ``metric``, and ``group`` is the same for items that share a context.
    """

    id: str
    task: str
    group: str
    before: str
    context: str
    after: str
    question: str
    gold: str
    answers: tuple[str, ...]
    metric: str
    max_tokens: int
    stop: tuple[str, ...] = ()

    def prompt(self, context: str | None = None) -> str:
        """The whole prompt, around ``context`` or around the item's own."""
        return self.before + (self.context if context is None else context) + self.after

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell prompts and gold answers apart."""
        return hashlib.sha256(f"{self.prompt()}\0{self.gold}".encode()).hexdigest()[:16]

    def score(self, prediction: str) -> float:
        """The score of a generated answer, a share in [0, 1]."""
        return metrics.best(self.metric, prediction, self.answers)

    def survives(self, context: str) -> bool | None:
        """Whether an answer stands in ``context``; None if none stands in the item's own."""

        def found(text: str) -> bool:
            return any(metrics.inclusion(text, a) for a in self.answers if metrics.normalize(a))

        return found(context) if found(self.context) else None


# ------------------------------------------------------------------------------------------ gsm8k

_CALCULATOR = re.compile(r"<<[^>]*>>")


def gsm8k(
    data: Path, *, limit: int | None = None, seed: int = 0, shots: int = 8, contexts: int = 25
) -> list[Item]:
    """Word problems after ``shots`` worked exemplars of the training part.

    The exemplars are the context. ``contexts`` different ones are drawn and dealt out in turn,
    so that a result does not hang on one lucky draw and intervals can tell contexts apart.
    """
    pool = list(read_rows(find(data, "gsm8k/train")))
    chance = random.Random(seed)

    def solution(row: dict[str, Any]) -> str:
        return _CALCULATOR.sub("", row["answer"])

    def exemplars() -> str:
        rows = chance.sample(pool, shots)
        return "\n\n".join(f"Question: {r['question']}\nAnswer: {solution(r)}" for r in rows)

    drawn = [exemplars() for _ in range(contexts)]
    return [
        Item(
            id=row["id"],
            task="gsm8k",
            group=f"gsm8k-{i % contexts}",
            before="",
            context=drawn[i % contexts],
            after=f"\n\nQuestion: {row['question']}\nAnswer:",
            question=row["question"],
            gold=" " + solution(row),
            answers=(solution(row),),
            metric="final_number",
            max_tokens=160,
            stop=("\nQuestion:",),
        )
        for i, row in enumerate(_take(read_rows(find(data, "gsm8k/test")), limit))
    ]


# -------------------------------------------------------------------------------------- longbench

LONGBENCH = {
    "narrativeqa": "token_f1",
    "qasper": "token_f1",
    "multifieldqa_en": "token_f1",
    "hotpotqa": "token_f1",
    "2wikimqa": "token_f1",
    "musique": "token_f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "trec": "exact_match",
    "triviaqa": "token_f1",
    "passage_retrieval_en": "number_match",
    "lcc": "edit_similarity",
}
"""The English LongBench tasks there is data for, and their scores."""

_SEVERAL_LINES = ("gov_report", "qmsum", "lcc")


def longbench(data: Path, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The LongBench development rows in the benchmark's own prompts, ``limit`` a task."""
    templates = {r["task"]: r for r in read_rows(find(data, "longbench/templates"))}
    items = []
    for task, metric in LONGBENCH.items():
        for row in _take(read_rows(find(data, f"longbench/{task}")), limit):
            items.append(_longbench_item(row, templates[task], metric))
    return items


def _longbench_item(row: dict[str, Any], template: dict[str, Any], metric: str) -> Item:
    before, _, after = template["prompt_template"].partition("{context}")
    after = after.replace("{input}", row["input"])
    gold = row["answers"][0]
    return Item(
        id=row["id"],
        task=row["task"],
        group=row["id"],
        before=before,
        context=row["context"],
        after=after,
        # Summaries and code have none; what they ask for stands behind the context.
        question=row["input"] or after.strip(),
        gold=gold if after.endswith((" ", "\n")) else " " + gold,
        answers=tuple(row["answers"]),
        metric=metric,
        max_tokens=template["max_new_tokens"],
        stop=() if row["task"] in _SEVERAL_LINES else ("\n",),
    )


# ------------------------------------------------------------------- a passage, a pair, a needle

_ANSWER_BRIEFLY = "Answer the question with a few words from the text.\n\n"


def lost_in_the_middle(
    data: Path, *, limit: int | None = None, seed: int = 0, passages: int = 20
) -> list[Item]:
    """Natural questions over ``passages`` titled passages, the gold one at a place that goes
    round; the rest are drawn from other Wikipedia articles."""
    pool = list(read_rows(find(data, "wiki_passages/passages")))
    chance = random.Random(seed)
    items = []
    for i, row in enumerate(
        _take(read_rows(find(data, "lost_in_the_middle/nq_open_oracle")), limit)
    ):
        texts = [(p["title"], p["text"]) for p in chance.sample(pool, passages - 1)]
        texts.insert(i % passages, (row["gold_title"], row["gold_text"]))
        context = "\n".join(f"Document (Title: {t}) {text}" for t, text in texts)
        items.append(_short_answer("lost_in_the_middle", row["id"], context, row))
    return items


def key_value(data: Path, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """One value to be found by its key among 75 pairs of random identifiers."""
    items = []
    for row in _take(read_rows(find(data, "lost_in_the_middle/kv_retrieval_75")), limit):
        context = "\n".join(f"{key}: {value}" for key, value in row["ordered_kv_records"])
        asked = {"question": f"What is the value of {row['key']}?", "answers": [row["value"]]}
        items.append(_short_answer("key_value", row["id"], context, asked))
    return items


def needle(
    data: Path, *, limit: int | None = None, seed: int = 0, characters: int = 12_000
) -> list[Item]:
    """A sentence with a random number, planted between the sentences of a public speech at a
    depth that goes round."""
    speeches = [r["text"] for r in read_rows(find(data, "state_union/speeches"))]
    chance = random.Random(seed)
    count = 20 if limit is None else limit
    items = []
    for i in range(count):
        hay = chance.choice(speeches)
        if len(hay) > characters:
            start = chance.randrange(len(hay) - characters)
            hay = hay[start : start + characters]
        number, city = str(chance.randrange(10**6, 10**7)), chance.choice(CITIES)
        sentence = f" The secret number of {city} is {number}."
        # After the first full stop behind the wanted depth, or at the end without one.
        at = hay.find(".", int(len(hay) * (i % 10) / 10)) + 1 or len(hay)
        asked = {"question": f"What is the secret number of {city}?", "answers": [number]}
        context = hay[:at] + sentence + hay[at:]
        items.append(_short_answer("needle", f"needle-{i}", context, asked))
    return items


CITIES = ("Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn", "Perth", "Minsk", "Accra")


def _short_answer(task: str, name: str, context: str, asked: dict[str, Any]) -> Item:
    answers = tuple(asked["answers"])
    return Item(
        id=name,
        task=task,
        group=name,
        before=_ANSWER_BRIEFLY,
        context=context,
        after=f"\n\nQuestion: {asked['question']}\nAnswer:",
        question=asked["question"],
        gold=" " + answers[0],
        answers=answers,
        metric="inclusion",
        max_tokens=48,
        stop=("\n",),
    )


# ------------------------------------------------------------------------------------------ table

TASKS: dict[str, Callable[..., list[Item]]] = {
    "gsm8k": gsm8k,
    "longbench": longbench,
    "lost_in_the_middle": lost_in_the_middle,
    "key_value": key_value,
    "needle": needle,
}
"""Suites of items by name; each takes the data folder, ``limit`` and ``seed``."""


def load(name: str, data: Path, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The items of one suite. Raises ConfigError for an unknown name, InputError for data that
    is missing or lacks a field."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r} (known: {', '.join(TASKS)})")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: must be at least 1 (given: {limit})")
    try:
        return TASKS[name](data, limit=limit, seed=seed)
    except KeyError as error:
        raise InputError(f"the data of task {name!r} in {data} has no field {error}") from None


def _take(rows: Any, limit: int | None) -> list[dict[str, Any]]:
    return [row for i, row in enumerate(rows) if limit is None or i < limit]

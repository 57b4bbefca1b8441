"""Instructions to let a model answer, so that a drafter can learn from the answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from narrows.data import find, read_rows
from narrows.errors import InputError

FIELDS = ("prompt", "instruction", "question", "text")
"""Where a row of a user's own JSON Lines may hold its prompt, the first found."""
ANSWERS = ("answer", "output", "response", "completion")
"""Likewise an answer that came with the prompt."""
CHARACTERS = 4
"""Of a token, about."""


def _task(row: dict[str, Any]) -> str:
    given = row["instances"][0]["input"] if row.get("instances") else ""
    return f"{row['instruction']}\n\n{given}".strip()


def _question(row: dict[str, Any]) -> str:
    return str(row["question"])


def _retrieved(row: dict[str, Any]) -> str:
    return f"{row['gold_text']}\n{row['question']}?"


def _about(row: dict[str, Any]) -> str:
    return f"{row['context']}\n\nAnswer from the text: {row['question']}"


def _passage(row: dict[str, Any]) -> str:
    return f"Summarize this text about {row['title']}:\n\n{row['text']}"


def _writing(row: dict[str, Any]) -> str:
    task = WRITING[len(row["text"]) % len(WRITING)]
    return task.format(row["title"])


def _choice(row: dict[str, Any]) -> str:
    return "\n".join([row["question"], *(f"- {choice}" for choice in row["choices"])])


def _code(row: dict[str, Any]) -> str:
    return f"Complete this Python function and explain how it works:\n\n{row['prompt']}"


WRITING = (
    "Write a short story in which {} plays a part.",
    "Compose an engaging blog post about {}.",
    "Explain to a curious child what is worth knowing about {}.",
    "Imagine you know {} well. Write a letter to a friend about it.",
    "List five questions about {} and answer each of them.",
    "Outline an essay about {}, point by point.",
    "What are the advantages and disadvantages of {}?",
)
"""Tasks about a title: their answers are longer and freer than those to questions."""


SOURCES: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("self_instruct/seed_tasks", _task),
    ("self_instruct/user_oriented", _task),
    ("gsm8k/train", _question),
    ("trec_qc/train", _question),
    ("lost_in_the_middle/nq_open_oracle", _question),
    ("lost_in_the_middle/nq_open_oracle", _retrieved),
    ("spoken_squad/questions", _question),
    ("xquad_en/xquad_en", _about),
    ("wiki_passages/passages", _passage),
    ("wiki_passages/passages", _writing),
    ("mmlu/test_subset", _choice),
    ("truthfulqa/truthfulqa", _question),
    ("humaneval/humaneval", _code),
)
"""Parts of the benchmark data, and a prompt of a row."""
BENCHMARK = "spec_bench/question"
"""What drafting is measured on, of which nothing is to be learnt: some questions are in both."""


def from_data(folder: Path, count: int, seed: int = 0) -> list[str]:
    """``count`` different prompts, the SOURCES in turn as long as they last, in random order,
    without those whose question BENCHMARK asks. Raises InputError if there are fewer."""
    chance = random.Random(seed)
    measured = read_rows(find(folder, BENCHMARK))
    asked = "\n".join(turn for row in measured for turn in row["turns"]).lower()
    piles = []
    for name, make in SOURCES:
        rows = read_rows(find(folder, name))
        made = list(dict.fromkeys(make(row) for row in rows if not _known(row, asked)))
        chance.shuffle(made)
        piles.append(made)
    chosen: list[str] = []
    while len(chosen) < count and any(piles):
        chosen += [pile.pop() for pile in piles if pile]
    if len(chosen) < count:
        raise InputError(f"{folder} has only {len(chosen)} prompts, not {count}; ask for fewer")
    return chosen[:count]


def _known(row: dict[str, Any], asked: str) -> bool:
    question = str(row.get("question", "")).lower().strip(" ?")
    return bool(question) and question in asked


def long_from_data(folder: Path, count: int, characters: int, seed: int = 0) -> list[str]:
    """``count`` prompts of about ``characters`` each: titled passages from here and there, and one
    of them to be summarized. A drafter taught short prompts only guesses worse behind long ones."""
    chance = random.Random(seed)
    rows = list(read_rows(find(folder, "wiki_passages/passages")))
    made = []
    for _ in range(count):
        chosen: list[dict[str, Any]] = []
        while sum(len(row["text"]) for row in chosen) < characters:
            chosen.append(chance.choice(rows))
        texts = "\n\n".join(f"{row['title']}\n{row['text']}" for row in chosen)
        made.append(f"{texts}\n\nSummarize the text about {chance.choice(chosen)['title']}.")
    return made


def from_file(path: Path) -> list[str]:
    """The prompts of a JSON Lines file, from the first of FIELDS that a row has. Raises
    InputError for a row that has none, or an empty one."""
    return _column(path, FIELDS, "prompt")


def answers_from_file(path: Path) -> list[str]:
    """The answers beside the prompts, from the first of ANSWERS. Raises InputError likewise."""
    return _column(path, ANSWERS, "answer")


def _column(path: Path, fields: Sequence[str], what: str) -> list[str]:
    texts = []
    for number, row in enumerate(read_rows(path), 1):
        text = next((row[name] for name in fields if isinstance(row.get(name), str)), "")
        if not text.strip():
            raise InputError(
                f"{path}, row {number}: no {what}; a row needs text in one of {', '.join(fields)}"
            )
        texts.append(text)
    if not texts:
        raise InputError(f"{path} has no rows")
    return texts

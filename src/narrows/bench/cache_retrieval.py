"""Whether a fact planted at some depth of a long context is still found through a cache.

The context is read as a prompt and then compressed, as a document that is asked about later, and
the question fed token by token like the answer; or, ``visible``, the question is part of the
prompt, so that a cache may look at it when it chooses what to keep. A small model writes poor
answers, so the measure is the likelihood of the right one; greedy decoding writes exactly that
answer if every token of it is the likeliest.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from narrows.bench.cache_subjects import Subject
from narrows.bench.likelihood import answer_ids
from narrows.bench.metrics import bootstrap, paired_bootstrap
from narrows.bench.prose import read_windows
from narrows.bench.report import Row, row
from narrows.bench.tasks import CITIES
from narrows.data import find, read_rows
from narrows.errors import ConfigError, InputError
from narrows.model.flat import FlatModel

BLOCK = 8
"""Probes read side by side."""

TASKS = ("needle", "key_value")
LONGEST = 40
"""Tokens that a question with its answer may take behind a context."""

_WORD = re.compile(r"\b[a-z]{4,7}\b")


@dataclass(frozen=True, slots=True)
class Probe:
    """A planted fact, in token ids: ``context`` holds it at ``depth``, a share of the context.
    ``group`` is the same for probes over the same text."""

    task: str
    length: int
    depth: float
    group: str
    context: list[int]
    question: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Found:
    """Nats a token of the right answer, and whether greedy decoding writes it."""

    nll: float
    exact: bool


def make_probes(
    data: Path,
    model: FlatModel,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int,
) -> list[Probe]:
    """``count`` probes of each task at each length in tokens and each depth. Raises InputError
    if the data has too little text."""
    return [
        probe
        for length in lengths
        for probes in (
            needles(data, model, length, depths, count, seed),
            key_values(data, model, length, depths, count, seed),
        )
        for probe in probes
    ]


def needles(
    data: Path, model: FlatModel, length: int, depths: Sequence[float], count: int, seed: int
) -> list[Probe]:
    """A sentence with a random number behind a sentence of a speech or an article."""
    chance = random.Random(seed)
    probes = []
    for number, hay in enumerate(read_windows(data, model, count, length, seed)):
        for depth in depths:
            city, secret = chance.choice(CITIES), str(chance.randrange(10**6, 10**7))
            fact = answer_ids(model, f" The secret number of {city} is {secret}.")
            room = length - len(fact)
            at = _sentence_end(model, hay[:room], int(depth * room))
            probes.append(
                Probe(
                    "needle",
                    length,
                    depth,
                    f"needle-{length}-{number}",
                    hay[:at] + fact + hay[at:room],
                    answer_ids(model, f"\n\nThe secret number of {city} is"),
                    answer_ids(model, f" {secret}."),
                )
            )
    return probes


def key_values(
    data: Path, model: FlatModel, length: int, depths: Sequence[float], count: int, seed: int
) -> list[Probe]:
    """Lines of a key, two words, and its value, five digits; one of the keys is given again."""
    chance = random.Random(seed)
    words = _words(data)
    probes = []
    for number in range(count):
        pairs, lines = _pairs(model, words, length, chance)
        context = [token for line in lines for token in line][-length:]
        for depth in depths:
            # The first line may be cut, so it is never the one asked for.
            key, value = pairs[min(1 + int(depth * (len(pairs) - 1)), len(pairs) - 1)]
            probes.append(
                Probe(
                    "key_value",
                    length,
                    depth,
                    f"key_value-{length}-{number}",
                    context,
                    answer_ids(model, f"{key}:"),
                    answer_ids(model, f" {value}"),
                )
            )
    return probes


def _pairs(
    model: FlatModel, words: Sequence[str], length: int, chance: random.Random
) -> tuple[list[tuple[str, str]], list[list[int]]]:
    """Keys with values, and the tokens of their lines: at least ``length`` in all."""
    pairs: dict[str, str] = {}
    lines: list[list[int]] = []
    tokens = 0
    while tokens < length or len(pairs) < 2:
        if len(pairs) > len(words) ** 2 // 2:
            raise InputError(f"{len(words)} words make too few keys for {length} tokens")
        key = f"{chance.choice(words)} {chance.choice(words)}"
        if key in pairs:
            continue
        pairs[key] = str(chance.randrange(10**4, 10**5))
        lines.append(answer_ids(model, f"{key}: {pairs[key]}\n"))
        tokens += len(lines[-1])
    return list(pairs.items()), lines


def _words(data: Path) -> list[str]:
    """The short lower-case words of the speeches, each once, in alphabetical order."""
    rows = read_rows(find(data, "state_union/speeches"))
    return sorted({word for r in rows for word in _WORD.findall(r["text"])})


def _sentence_end(model: FlatModel, ids: Sequence[int], at: int) -> int:
    """The first place from ``at`` on that a full stop stands before, else ``at``."""
    for place in range(max(1, at), len(ids)):
        if model.tokenizer.decode([ids[place - 1]]).endswith("."):
            return place
    return at


# ---------------------------------------------------------------------------------------- asking


def visible(probe: Probe) -> Probe:
    """The probe with its question at the end of its context, but for the last token, which the
    first of the answer is predicted from."""
    *early, last = probe.question
    return replace(probe, context=probe.context + early, question=[last])


def ask(
    subject: Subject, probes: Sequence[Probe], advance: Callable[[], None] = lambda: None
) -> list[Found]:
    """What ``subject`` finds, probe by probe; ``advance`` is called after each block of them."""
    found: list[Found] = []
    for start in range(0, len(probes), BLOCK):
        found += _ask_block(subject, probes[start : start + BLOCK])
        advance()
    return found


def _ask_block(subject: Subject, block: Sequence[Probe]) -> list[Found]:
    readers = [subject.read(p.context) for p in block]
    fed = [p.question + p.answer[:-1] for p in block]
    nats: list[list[float]] = [[] for _ in block]
    exact = [True] * len(block)
    for number in range(max(map(len, fed))):
        active = [i for i, tokens in enumerate(fed) if number < len(tokens)]
        logits = subject.step([readers[i] for i in active], [fed[i][number] for i in active])
        for i, scores in zip(active, logits, strict=True):
            at = number - (len(block[i].question) - 1)
            if at >= 0:
                wanted = block[i].answer[at]
                nats[i].append(-float(scores.double().log_softmax(-1)[wanted]))
                exact[i] &= int(scores.argmax()) == wanted
    return [Found(sum(n) / len(n), e) for n, e in zip(nats, exact, strict=True)]


def retrieval_rows(
    subjects: Sequence[Subject],
    probes: Sequence[Probe],
    found: dict[str, list[Found]],
    versus: Sequence[str],
    *,
    seed: int,
    **named: Any,
) -> list[Row]:
    """Rows of each task, by length and depth and over all depths (``depth`` None); over all
    depths also the difference in nats from each of ``versus``, probe by probe. Intervals draw
    texts."""
    rows = []
    for subject in subjects:
        for task, length, depth in _cells(probes):
            chosen = [
                i
                for i, p in enumerate(probes)
                if (p.task, p.length) == (task, length) and depth in (None, p.depth)
            ]
            groups = [probes[i].group for i in chosen]
            mine = [found[subject.method][i] for i in chosen]
            where = {
                **named,
                "part": "retrieval",
                "method": subject.method,
                "engine": subject.engine,
                "task": task,
                "length": length,
                "depth": depth,
                "n": len(chosen),
            }
            nll, exact = [f.nll for f in mine], [float(f.exact) for f in mine]
            for metric, unit, values in (
                ("answer_nll", "nats/token", nll),
                ("answer_exact", "share", exact),
            ):
                interval = bootstrap(values, groups, seed=seed)
                value = sum(values) / len(values)
                rows.append(
                    row("cache", metric=metric, unit=unit, value=value, interval=interval, **where)
                )
            for other in versus if depth is None else ():
                if other == subject.method:
                    continue
                theirs = [found[other][i].nll for i in chosen]
                mean, interval = paired_bootstrap(nll, theirs, groups, seed=seed)
                rows.append(
                    row(
                        "cache",
                        metric="answer_nll_difference",
                        unit="nats/token",
                        value=mean,
                        interval=interval,
                        versus=other,
                        **where,
                    )
                )
    return rows


def _cells(probes: Sequence[Probe]) -> list[tuple[str, int, float | None]]:
    cells: dict[tuple[str, int, float | None], None] = {}
    for p in probes:
        cells[p.task, p.length, None] = None
    for p in probes:
        cells[p.task, p.length, p.depth] = None
    return list(cells)


def check_retrieval(
    lengths: Sequence[int], depths: Sequence[float], count: int, model: FlatModel
) -> None:
    """Raises ConfigError for probes that cannot be made or do not fit the model's window."""
    if not lengths or not depths or count < 1:
        raise ConfigError("retrieval needs lengths, depths and at least one probe of each")
    if min(lengths) < LONGEST or max(lengths) + LONGEST > model.shape.max_tokens:
        raise ConfigError(
            f"retrieval lengths must lie between {LONGEST} and {model.name}'s window of "
            f"{model.shape.max_tokens} less {LONGEST} (given: {', '.join(map(str, lengths))})"
        )
    wrong = [d for d in depths if not 0 <= d <= 1]
    if wrong:
        raise ConfigError(f"depths must lie between 0 and 1 (given: {wrong[0]})")

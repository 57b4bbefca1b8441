"""How far a cache moves the model's predictions: text read token by token through what is held.

One full forward pass would measure nothing, since a prompt attends to keys and values before they
are compressed. Every window has a prefix, which is read as a prompt, and decoded tokens: true
text, fed one by one. Only the predictions of those count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from narrows.bench.cache_subjects import Subject
from narrows.bench.metrics import bootstrap, bootstrap_quantile, paired_bootstrap
from narrows.bench.prose import read_windows
from narrows.bench.report import Row, row
from narrows.errors import ConfigError
from narrows.model.flat import FlatModel

BLOCK = 8
"""Windows read side by side; their dense logits are kept while the others are compared."""

Grid = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids: ``prefix`` is read as a prompt; each of ``decoded`` is then fed, and the next
    one predicted, so that one more follows than predictions are made."""

    prefix: list[int]
    decoded: list[int]


@dataclass(slots=True)
class Predictions:
    """What one subject predicted over the windows, ``[windows, tokens]`` each: KL divergence in
    nats of its prediction from the dense one, whether the likeliest token is the same, nats of
    the true token; and the bytes it held after each token, ``[windows, tokens]``."""

    kl: list[Grid] = field(default_factory=list)
    agrees: list[Grid] = field(default_factory=list)
    nll: list[Grid] = field(default_factory=list)
    held: list[Grid] = field(default_factory=list)

    def pooled(self, name: str) -> tuple[list[float], list[int]]:
        """All values of one measure, and the window each belongs to."""
        grid = np.concatenate(getattr(self, name))
        return grid.ravel().tolist(), np.repeat(np.arange(len(grid)), grid.shape[1]).tolist()


def read_text(
    data: Path, model: FlatModel, *, windows: int, prefix: int, decoded: int, seed: int
) -> list[Window]:
    """Windows of speeches and encyclopaedia articles, see ``prose.read_windows``."""
    texts = read_windows(data, model, windows, prefix + decoded + 1, seed)
    return [Window(ids[:prefix], ids[prefix:]) for ids in texts]


class Quality:
    """Reads windows through subjects and keeps what they predicted.

    ``dense`` has, for each engine among the subjects, the subject whose predictions the others of
    that engine are compared with; it is measured too.
    """

    def __init__(self, subjects: Sequence[Subject], dense: dict[str, Subject]) -> None:
        self.subjects = subjects
        self.dense = dense
        self.found = {s.method: Predictions() for s in subjects}

    def read(self, windows: Sequence[Window], advance: Callable[[], None] = lambda: None) -> None:
        """Measure every subject on ``windows``, calling ``advance`` after each subject's block
        of them."""
        for start in range(0, len(windows), BLOCK):
            block = windows[start : start + BLOCK]
            for engine, yardstick in self.dense.items():
                reference = list(_decode(yardstick, block))
                wanted = [logits for logits, _ in reference]
                for subject in self.subjects:
                    if subject is yardstick:
                        self._note(subject, block, wanted, reference)
                    elif subject.engine == engine:
                        self._note(subject, block, wanted, _decode(subject, block))
                    else:
                        continue
                    advance()

    def _note(
        self,
        subject: Subject,
        block: Sequence[Window],
        wanted: Sequence[Tensor],
        decoded: Iterable[tuple[Tensor, list[int]]],
    ) -> None:
        truth = torch.tensor([w.decoded[1:] for w in block], device=wanted[0].device)
        columns: dict[str, list[Tensor]] = {"kl": [], "agrees": [], "nll": []}
        held = []
        for number, (reference, (given, size)) in enumerate(zip(wanted, decoded, strict=True)):
            measured = compare(reference, given, truth[:, number])
            for name, values in zip(columns, measured, strict=True):
                columns[name].append(values)
            held.append(size)
        found = self.found[subject.method]
        for name, parts in columns.items():
            getattr(found, name).append(torch.stack(parts, dim=1).cpu().numpy())
        found.held.append(np.array(held, dtype=np.float64).T)


def _decode(subject: Subject, block: Sequence[Window]) -> Iterator[tuple[Tensor, list[int]]]:
    """After each decoded token of the windows: logits of the next one, and bytes held."""
    readers = [subject.read(w.prefix) for w in block]
    for tokens in zip(*(w.decoded[:-1] for w in block), strict=True):
        yield subject.step(readers, tokens), [subject.held(r) for r in readers]


def compare(dense: Tensor, given: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL divergence of ``given`` from ``dense`` in nats, whether their likeliest tokens agree,
    and nats of ``truth`` int64 ``[n]`` under ``given``; logits ``[n, vocab_size]``, results
    float64 ``[n]``."""
    p, q = dense.double().log_softmax(-1), given.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    agrees = (dense.argmax(-1) == given.argmax(-1)).double()
    return kl, agrees, -q.gather(-1, truth[:, None])[:, 0]


def quality_rows(
    quality: Quality, elements: int, *, seed: int, part: str = "quality", **named: Any
) -> list[Row]:
    """Rows of every subject: means with intervals that draw whole windows.

    ``elements`` are the numbers one token's keys and values have in all layers; ``named`` goes to
    every row. ``true_bits`` counts all bytes held, on average over the decoded tokens.
    """
    rows = []
    for subject in quality.subjects:
        found = quality.found[subject.method]
        grid = np.concatenate(found.held)
        lengths = named["prefix"] + 1 + np.arange(grid.shape[1])
        bits = (8 * grid / (lengths * elements)).mean()
        where = {
            **named,
            "part": part,
            "method": subject.method,
            "engine": subject.engine,
            "nominal_bits": subject.nominal_bits,
            "true_bits": float(bits),
        }
        rows += _subject_rows(found, seed, where)
    return rows


def _subject_rows(found: Predictions, seed: int, where: dict[str, Any]) -> list[Row]:
    kl, windows = found.pooled("kl")
    nll, _ = found.pooled("nll")
    agrees, _ = found.pooled("agrees")
    low, high = bootstrap(nll, windows, seed=seed)
    p99 = float(np.quantile(kl, 0.99))
    measured = [
        ("kl", "nats", float(np.mean(kl)), bootstrap(kl, windows, seed=seed)),
        ("kl_p99", "nats", p99, bootstrap_quantile(kl, 0.99, windows, seed=seed)),
        ("top1_agreement", "share", float(np.mean(agrees)), bootstrap(agrees, windows, seed=seed)),
        ("perplexity", "1", math.exp(np.mean(nll)), (math.exp(low), math.exp(high))),
    ]
    return [
        row("cache", metric=metric, unit=unit, value=value, interval=interval, n=len(kl), **where)
        for metric, unit, value, interval in measured
    ]


DIFFERENCES = {"kl": "nats", "nll": "nats/token", "agrees": "share"}


def difference_rows(
    quality: Quality,
    versus: Sequence[str],
    *,
    seed: int,
    part: str = "quality",
    **named: Any,
) -> list[Row]:
    """Rows of the mean difference of each subject from each of ``versus``, token by token over
    the same windows, with intervals that draw whole windows."""
    rows = []
    for other in versus:
        theirs = quality.found[other]
        for subject in quality.subjects:
            if subject.method == other:
                continue
            for name, unit in DIFFERENCES.items():
                ours, windows = quality.found[subject.method].pooled(name)
                mean, interval = paired_bootstrap(ours, theirs.pooled(name)[0], windows, seed=seed)
                metric = "top1_agreement" if name == "agrees" else name
                rows.append(
                    row(
                        "cache",
                        **named,
                        part=part,
                        method=subject.method,
                        engine=subject.engine,
                        versus=other,
                        metric=f"{metric}_difference",
                        unit=unit,
                        value=mean,
                        interval=interval,
                        n=len(ours),
                    )
                )
    return rows


def check_text(windows: int, prefix: int, decoded: int, model: FlatModel) -> None:
    """Raises ConfigError for sizes that measure nothing or do not fit the model's window."""
    if windows < 1 or prefix < 1 or decoded < 1:
        raise ConfigError("windows, prefix and decoded must each be at least 1")
    if prefix + decoded > model.shape.max_tokens:
        raise ConfigError(
            f"prefix and decoded have {prefix} + {decoded} tokens but {model.name} takes "
            f"{model.shape.max_tokens}"
        )

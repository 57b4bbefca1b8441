"""Five statements about attention-aware compression, each measured on a real model.

R1  surprisal and attention received are almost uncorrelated
R2  deleting the most attended tokens hurts more than deleting as many at random
R3  deletion changes the surprisal of what is left, the more the more is deleted
R4  surprisal and attention together do no worse than surprisal alone
R5  rescoring between deletions does no worse than one scoring, the more so the more is deleted

A row states what was measured, never whether the statement holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.bench.arms import Arm, Budget
from narrows.bench.likelihood import answer_nll
from narrows.bench.measure import Measurer, gap_rows
from narrows.bench.metrics import bootstrap, paired_bootstrap
from narrows.bench.prose import read_prose
from narrows.bench.report import Row, row
from narrows.bench.tasks import gsm8k
from narrows.compression.score import Scorer, TokenScores
from narrows.model.flat import FlatModel

PASSAGE, CONTINUATION = 600, 64
"""Tokens compressed, and tokens behind them whose likelihood is measured."""
SHARES = (0.1, 0.3, 0.5)
"""Shares deleted."""
KEEP = (0.5, 0.2, 0.1)
FUSED, SURPRISAL = "dac:stages=5", "surprisal-dynamic:stages=5"
DYNAMIC = ("dac:stages=10", "dac:stages=5", "dac-static")
"""Most rescoring first; the others are compared with it."""

Floats = NDArray[np.float64]


def claim_rows(measurer: Measurer, data: Path, *, quick: bool = False) -> list[Row]:
    """Rows of R1 to R5; ``quick`` measures next to nothing, of everything."""
    model, seed = measurer.llm.model, measurer.seed
    passages = 2 if quick else 100
    prose = read_prose(data, model, passages * (PASSAGE + CONTINUATION)).ids
    pieces = [
        prose[i : i + PASSAGE + CONTINUATION] for i in range(0, len(prose), PASSAGE + CONTINUATION)
    ]
    rows = correlation_rows(model, pieces, seed)
    rows += deletion_rows(model, pieces, seed)
    rows += shift_rows(model, pieces, seed)
    limit, keep = (2, KEEP[:1]) if quick else (100, KEEP)
    # The items of the likelihood part, so that what it remembers serves here too.
    items = gsm8k(data, limit=limit, seed=seed)
    for share in keep:
        for claim, specs in (("R4", (FUSED, SURPRISAL)), ("R5", DYNAMIC)):
            ours, *others = (
                measurer.measure(items, Arm(spec, model), Budget(keep=share)) for spec in specs
            )
            for other in others:
                rows += gap_rows(ours, other, part=claim, task="gsm8k")
    return rows


def correlation_rows(model: FlatModel, pieces: Sequence[list[int]], seed: int) -> list[Row]:
    """R1: correlation of surprisal with attention received, per passage."""
    rows = []
    for norm in ("sum", "vs_uniform"):
        scores = [_score(model, p, norm) for p in pieces]
        pairs = [(s.surprisal[1:], s.attention[1:]) for s in scores if s.attention is not None]
        for metric, measure in (("pearson", pearson), ("spearman", spearman)):
            values = [measure(a, b) for a, b in pairs]
            tokens = sum(len(a) for a, _ in pairs)
            rows.append(
                _row(
                    model,
                    "R1",
                    f"attention {norm}",
                    f"{metric}_surprisal_attention",
                    "1",
                    values,
                    seed,
                    tokens=tokens,
                )
            )
    return rows


def deletion_rows(model: FlatModel, pieces: Sequence[list[int]], seed: int) -> list[Row]:
    """R2: likelihood of the continuation after deleting tokens of the passage, by rule, and the
    difference from random deletion."""
    rows = []
    scores = [_score(model, p[:PASSAGE], "sum") for p in pieces]
    for share in SHARES:
        nll = {
            rule: [
                answer_nll(model, _without(p[:PASSAGE], order(s, i), share), p[PASSAGE:])
                for i, (p, s) in enumerate(zip(pieces, scores, strict=True))
            ]
            for rule, order in _rules(seed).items()
        }
        where = {"budget": f"{1 - share:g}", "task": "prose"}
        for rule, values in nll.items():
            rows.append(
                _row(model, "R2", rule, "continuation_nll", "nats/token", values, seed, **where)
            )
            if rule != "random":
                mean, interval = paired_bootstrap(values, nll["random"], seed=seed)
                rows.append(
                    row(
                        "compress",
                        part="R2",
                        method=rule,
                        model=model.name,
                        metric="continuation_nll_difference",
                        unit="nats/token",
                        value=mean,
                        interval=interval,
                        n=len(values),
                        versus="random",
                        **where,
                    )
                )
    return rows


def shift_rows(model: FlatModel, pieces: Sequence[list[int]], seed: int) -> list[Row]:
    """R3: correlation of the surviving tokens' surprisal before and after deletion, and its mean
    change, by rule."""
    rows = []
    for share in SHARES:
        for rule in ("least surprising", "random"):
            linear, change = [], []
            for i, piece in enumerate(pieces):
                scores = _score(model, piece, "sum")
                gone = _rules(seed)[rule](scores, i)
                kept = _kept(len(piece), gone, share)
                before = scores.surprisal[kept][1:]
                after = _score(model, [piece[t] for t in kept], "sum").surprisal[1:]
                linear.append(pearson(before, after))
                change.append(float(np.abs(after - before).mean()))
            where = {"budget": f"{1 - share:g}", "task": "prose"}
            rows.append(_row(model, "R3", rule, "pearson_before_after", "1", linear, seed, **where))
            rows.append(_row(model, "R3", rule, "surprisal_change", "nats", change, seed, **where))
    return rows


def pearson(a: Floats, b: Floats) -> float:
    """Linear correlation; 0.0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0


def spearman(a: Floats, b: Floats) -> float:
    """Correlation of ranks (no two values are expected to be equal)."""
    return pearson(a.argsort().argsort().astype(float), b.argsort().argsort().astype(float))


def _score(model: FlatModel, ids: list[int], norm: Any) -> TokenScores:
    return Scorer(model, chunk_tokens=0, attn_norm=norm).score(ids)


def _rules(seed: int) -> dict[str, Callable[[TokenScores, int], NDArray[np.int64]]]:
    """Deletion orders by name: token indices from the first to go, for scores and the number of
    the passage. The first token is never among them."""

    def attended(scores: TokenScores, _: int) -> NDArray[np.int64]:
        assert scores.attention is not None
        return 1 + np.argsort(-scores.attention[1:], kind="stable")

    def dull(scores: TokenScores, _: int) -> NDArray[np.int64]:
        return 1 + np.argsort(scores.surprisal[1:], kind="stable")

    def chance(scores: TokenScores, number: int) -> NDArray[np.int64]:
        return 1 + np.random.default_rng([seed, number]).permutation(len(scores.surprisal) - 1)

    return {"most attended": attended, "least surprising": dull, "random": chance}


def _kept(count: int, order: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(count), order[: round(share * count)])


def _without(ids: list[int], order: NDArray[np.int64], share: float) -> list[int]:
    return [ids[t] for t in _kept(len(ids), order, share)]


def _row(
    model: FlatModel,
    claim: str,
    method: str,
    metric: str,
    unit: str,
    values: Sequence[float],
    seed: int,
    **where: Any,
) -> Row:
    return row(
        "compress",
        part=claim,
        method=method,
        model=model.name,
        metric=metric,
        unit=unit,
        value=float(np.mean(values)),
        interval=bootstrap(values, seed=seed),
        n=len(values),
        **where,
    )

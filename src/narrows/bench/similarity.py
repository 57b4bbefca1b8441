"""``narrows diagnose similarity``: ``cache.similarity``'s report as rows, table and picture."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from narrows.bench.provenance import provenance
from narrows.bench.report import Row, row, with_provenance
from narrows.cache import similarity
from narrows.cache.similarity import MEASURES, TENSORS, PairLikeness, SimilarityReport
from narrows.figure import new_figure, save_figure
from narrows.model.flat import FlatModel
from narrows.retrieve.documents import read_document

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "near": "codes differ by 0 or 1",
    "top": "same top bit",
    "codes": "correlation of codes",
    "plain": "correlation",
    "explained": "variance explained",
}
"""What each measure is called in the table and the picture."""

SIDES = {"text": "text", "chance": "permuted tokens"}


def run(
    *,
    model: str,
    text: str,
    tokens: int = 2048,
    bits: int = 2,
    group: int = 128,
    value_group: int = 64,
    dtype: str = "bfloat16",
    device: str | None = None,
    seed: int = 0,
) -> SimilarityReport:
    """Measure ``model`` on the first ``tokens`` tokens of the document ``text`` (a path, or "-").
    Raises what ``similarity.measure`` raises, InputError and ModelError."""
    document = read_document(text).text
    loaded = FlatModel.load(model, dtype=dtype, device=device)
    ids = loaded.tokenizer(document, add_special_tokens=True)["input_ids"][:tokens]
    return similarity.measure(
        loaded, ids, bits=bits, group=group, value_group=value_group, seed=seed
    )


def rows(report: SimilarityReport) -> list[Row]:
    """A row for each pair, tensor, measure and side (the text, or its tokens permuted): the mean
    over KV heads, from the least head to the greatest."""
    found = []
    for pair in report.pairs:
        for measure in MEASURES:
            for side, name in SIDES.items():
                heads = getattr(getattr(pair, side), measure)
                found.append(
                    row(
                        "similarity",
                        method=name,
                        model=report.model,
                        metric=measure,
                        unit="share" if measure in ("near", "top", "explained") else "correlation",
                        value=fmean(heads),
                        interval=(min(heads), max(heads)),
                        n=len(heads),
                        spread="min-max over heads",
                        tensor=pair.tensor,
                        pair=list(pair.layers),
                        tokens=report.tokens,
                        bits=report.bits,
                        group=report.group if pair.tensor == "keys" else report.value_group,
                    )
                )
    return with_provenance(found, provenance(report.seed))


def table(report: SimilarityReport) -> Table:
    """A line for each tensor and pair; in brackets what permuted tokens give."""
    from rich.table import Table

    result = Table(
        title=f"{report.model} · {report.tokens} tokens, {report.bits}-bit codes · in brackets: "
        "the same with the upper layer's tokens permuted",
        caption="variance explained beyond chance: "
        + ", ".join(f"{tensor} {_range(report, tensor)}" for tensor in TENSORS)
        + "\nbest pairs of values to share: "
        + similarity.propose(report)
        + "\nbest pairs of keys or values: "
        + similarity.propose(report, TENSORS),
    )
    result.add_column("")
    result.add_column("layers")
    for measure in MEASURES:
        result.add_column(TITLES[measure], justify="right")
    for tensor in TENSORS:
        chosen = [pair for pair in report.pairs if pair.tensor == tensor]
        for pair in chosen:
            cells = [_cell(pair, measure) for measure in MEASURES]
            result.add_row(tensor, f"{pair.layers[0]}-{pair.layers[1]}", *cells)
        result.add_section()
    return result


def _range(report: SimilarityReport, tensor: str) -> str:
    gains = [similarity.beyond_chance(pair) for pair in report.pairs if pair.tensor == tensor]
    return f"{min(gains):.3f} to {max(gains):.3f}"


def _cell(pair: PairLikeness, measure: str) -> str:
    here, chance = (fmean(getattr(side, measure)) for side in (pair.text, pair.chance))
    return f"{here:.3f} ({chance:.3f})"


def draw(report: SimilarityReport, path: Path) -> None:
    """Draw a PNG: a row of panels for keys and one for values, a panel a measure, over the pairs;
    bands reach from the least KV head to the greatest. Raises ConfigError without matplotlib,
    InputError if it cannot be written."""
    figure = new_figure(4 * len(MEASURES), 6.5)
    grid = figure.subplots(len(TENSORS), len(MEASURES), squeeze=False, sharex=True)
    for tensor, line in zip(TENSORS, grid, strict=True):
        pairs = [pair for pair in report.pairs if pair.tensor == tensor]
        at = [pair.layers[1] for pair in pairs]
        for measure, axes in zip(MEASURES, line, strict=True):
            for side, name in SIDES.items():
                heads = [getattr(getattr(pair, side), measure) for pair in pairs]
                (drawn,) = axes.plot(at, [fmean(h) for h in heads], marker=".", label=name)
                low, high = [min(h) for h in heads], [max(h) for h in heads]
                axes.fill_between(at, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
            axes.set_title(f"{tensor}: {TITLES[measure]}", fontsize="medium")
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("upper layer of the pair")
    grid[0][0].legend(fontsize="small")
    figure.suptitle(
        f"{report.model}, {report.tokens} tokens, {report.bits}-bit codes, groups of "
        f"{report.group} tokens (keys) and {report.value_group} channels (values)"
    )
    save_figure(figure, path)

"""``narrows diagnose redundancy``: ``cache.redundancy``'s report as rows, table and picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from narrows.bench.provenance import provenance
from narrows.bench.report import Row, row, with_provenance
from narrows.cache import redundancy
from narrows.cache.redundancy import MEASURES, RedundancyReport
from narrows.figure import new_figure, save_figure
from narrows.model.flat import FlatModel
from narrows.retrieve.documents import read_document

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "keys": "pairs of keys alike",
    "keys_rotated": "after rotation",
    "values": "pairs of values alike",
    "key_entries": "key entries a token",
    "value_entries": "value entries a token",
    "keys_across": "nearest keys of two heads",
    "values_across": "nearest values of two heads",
    "attention": "attention on the top tenth",
}
"""What each measure is called in the table and the picture."""


def run(
    *,
    model: str,
    text: str,
    tokens: int = 2048,
    theta_k: float = 0.98,
    theta_v: float = 0.95,
    dtype: str = "bfloat16",
    device: str | None = None,
) -> RedundancyReport:
    """Measure ``model`` on the first ``tokens`` tokens of the document ``text`` (a path, or "-").
    Raises what ``redundancy.measure`` raises, InputError and ModelError."""
    document = read_document(text).text
    loaded = FlatModel.load(model, dtype=dtype, device=device)
    ids = loaded.tokenizer(document, add_special_tokens=True)["input_ids"][:tokens]
    return redundancy.measure(loaded, ids, theta_k=theta_k, theta_v=theta_v)


def rows(report: RedundancyReport) -> list[Row]:
    """A row for each layer and measure."""
    found = []
    for layer in report.layers:
        for measure in MEASURES:
            value = getattr(layer, measure)
            found.append(
                row(
                    "redundancy",
                    method="dense",
                    model=report.model,
                    metric=measure,
                    unit="cosine" if measure.endswith("across") else "share",
                    value=value,
                    interval=(value, value),
                    n=1,
                    spread="exact",
                    layer=layer.layer,
                    tokens=report.tokens,
                    theta_k=report.theta_k,
                    theta_v=report.theta_v,
                )
            )
    return with_provenance(found, provenance(0))


def table(report: RedundancyReport) -> Table:
    """A line a layer."""
    from rich.table import Table

    result = Table(
        title=f"{report.model} · {report.tokens} tokens · alike: cosine above {report.theta_k:g} "
        f"(keys), {report.theta_v:g} (values)"
    )
    result.add_column("layer", justify="right")
    for measure in MEASURES:
        result.add_column(TITLES[measure], justify="right")
    for layer in report.layers:
        result.add_row(str(layer.layer), *(f"{getattr(layer, m):.3f}" for m in MEASURES))
    return result


def draw(report: RedundancyReport, path: Path) -> None:
    """Draw a PNG: a panel a measure over the layers. Raises ConfigError without matplotlib,
    InputError if it cannot be written."""
    figure = new_figure(15, 6.5)
    grid = figure.subplots(2, 4, squeeze=False, sharex=True)
    at = [layer.layer for layer in report.layers]
    for measure, axes in zip(MEASURES, grid.flat, strict=True):
        axes.plot(at, [getattr(layer, measure) for layer in report.layers], marker=".")
        axes.set_title(TITLES[measure], fontsize="medium")
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    figure.suptitle(
        f"{report.model}, {report.tokens} tokens; alike: cosine above {report.theta_k:g} (keys), "
        f"{report.theta_v:g} (values)"
    )
    save_figure(figure, path)

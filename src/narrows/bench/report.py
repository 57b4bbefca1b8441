"""Rows of results: built in one shape, written as JSON Lines, printed as a table, drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from narrows.errors import ConfigError
from narrows.figure import new_figure, save_figure
from narrows.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def row(
    bench: str,
    *,
    method: str,
    model: str,
    metric: str,
    unit: str,
    value: float,
    interval: Sequence[float],
    n: int,
    spread: str = "bootstrap 95%",
    **where: Any,
) -> Row:
    """One measured number.

    ``interval`` is (low, high) in ``unit``, of the kind ``spread`` says (``"bootstrap 95%"`` over
    ``n`` items or ``"min-max"`` over ``n`` repetitions). ``where`` says what was measured: task,
    budget, batch, what it is compared with.
    """
    return {
        "bench": bench,
        **where,
        "method": method,
        "model": model,
        "metric": metric,
        "unit": unit,
        "value": value,
        "interval": list(interval),
        "spread": spread,
        "n": n,
    }


def repeated_row(
    bench: str,
    method: str,
    model: str,
    metric: str,
    unit: str,
    values: Sequence[float],
    **where: Any,
) -> Row:
    """One number measured in several rounds: their median, from minimum to maximum."""
    return row(
        bench,
        method=method,
        model=model,
        metric=metric,
        unit=unit,
        value=median(values),
        interval=(min(values), max(values)),
        spread="min-max",
        n=len(values),
        **where,
    )


def absent_row(bench: str, *, why: str, **named: Any) -> Row:
    """A number that was not measured, and ``why``; all else as in ``row``."""
    nothing = math.nan
    told = row(bench, value=nothing, interval=(nothing, nothing), spread="none", n=0, **named)
    return {**told, "why": why}


def with_provenance(rows: Iterable[Row], facts: Mapping[str, Any]) -> list[Row]:
    """The rows, each with the facts of its run (see ``provenance``)."""
    return [{**r, **facts} for r in rows]


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line, whole or not at all. A number that is not finite becomes
    null. Raises InputError if the file cannot be written."""
    text = "".join(json.dumps(_finite(r), ensure_ascii=False) + "\n" for r in rows)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def table(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    """A rich table of the rows: the ``columns`` that any row fills, then metric, value and
    interval. Print it with ``rich.print``."""
    from rich.table import Table

    shown = [c for c in columns if any(r.get(c) is not None for r in rows)]
    result = Table(title=", ".join(dict.fromkeys(f"{r['bench']} · {r['model']}" for r in rows)))
    for name in shown:
        result.add_column(name)
    result.add_column("metric")
    for name in ("value", "interval", "n"):
        result.add_column(name, justify="right")
    for r in rows:
        cells = ["" if r.get(c) is None else f"{r[c]}" for c in shown]
        low, high = r["interval"]
        result.add_row(
            *cells,
            f"{r['metric']} ({r['unit']})",
            f"{r['value']:.4g}",
            f"{low:.4g} to {high:.4g}",
            str(r["n"]),
        )
    return result


def pivot(rows: Sequence[Row], title: str, where: Sequence[str]) -> Table:
    """A rich table with a line a method and a column a measure: metric with unit, and the values
    of those ``where`` fields that differ between the rows. Cells are value and interval, or why
    there is none."""
    from rich.table import Table

    telling = [w for w in where if len({str(r.get(w)) for r in rows}) > 1]
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for r in rows:
        parts = [f"{r['metric']} ({r['unit']})", *(f"{w} {r[w]}" for w in telling if w in r)]
        columns[", ".join(parts)] = None
        cells.setdefault(r["method"], {})[", ".join(parts)] = r.get("why") or _cell(r)
    result = Table(title=title, show_lines=True)
    result.add_column("method")
    for name in columns:
        result.add_column(name, justify="right")
    for method, line in cells.items():
        result.add_row(method, *(line.get(name, "") for name in columns))
    return result


def _cell(r: Row) -> str:
    low, high = r["interval"]
    return f"{r['value']:.4g}" + (f"\n{low:.3g} to {high:.3g}" if low < high else "")


PLACES = ("source", "question", "task", "length")
"""Fields that tell measurements of one part apart in ``tables``."""


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table (see ``pivot``) a part, and one of each difference from another method; retrieval
    over all depths."""
    made = []
    for part in dict.fromkeys(r["part"] for r in rows):
        inside = [r for r in rows if r["part"] == part and r.get("depth") is None]
        for other in dict.fromkeys(r.get("versus") for r in inside):
            chosen = [r for r in inside if r.get("versus") == other]
            title = part if other is None else f"{part}, versus {other}"
            made.append(pivot(chosen, title, PLACES))
    return made


def draw(rows: Sequence[Row], path: Path, *, x: str, panel: str, series: str = "method") -> None:
    """Draw the rows as a PNG: a panel for each value of ``panel``, in it a line for each value
    of ``series`` over ``x``, bars showing the intervals.

    Raises ConfigError without matplotlib or without rows, InputError if it cannot be written.
    """
    panels = list(dict.fromkeys(r[panel] for r in rows))
    if not panels:
        raise ConfigError(f"there are no rows to draw in {path}")
    figure = new_figure(5.5 * len(panels), 4.5)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        inside = [r for r in rows if r[panel] == name]
        places = list(dict.fromkeys(str(r[x]) for r in inside))
        for label in dict.fromkeys(r[series] for r in inside):
            line = [r for r in inside if r[series] == label]
            # Matplotlib wants distances from the point, and refuses a negative one.
            low = [max(0.0, r["value"] - r["interval"][0]) for r in line]
            high = [max(0.0, r["interval"][1] - r["value"]) for r in line]
            at = [places.index(str(r[x])) for r in line]
            values = [r["value"] for r in line]
            axes.errorbar(at, values, yerr=[low, high], marker="o", capsize=2, label=label)
        metric, unit = inside[0]["metric"], inside[0]["unit"]
        axes.set_title(name if isinstance(name, str) else f"{panel} {name}")
        axes.set(xlabel=x, ylabel=metric if unit == "1" else f"{metric} ({unit})")
        axes.set_xticks(range(len(places)), places)
        axes.legend(fontsize="x-small")
    save_figure(figure, path)


def draw_points(rows: Sequence[Row], path: Path, *, x: str, label: str = "method") -> None:
    """Draw the rows as one panel of a PNG, see ``plot_points``. Raises as ``draw``."""
    if not rows:
        raise ConfigError(f"there are no rows to draw in {path}")
    longest = max(len(str(r[label])) for r in rows)
    figure = new_figure(max(8, longest / 6), 6.5)  # two such names stand side by side below
    plot_points(figure.subplots(), rows, x=x, label=label)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    save_figure(figure, path)


def plot_points(axes: Any, rows: Sequence[Row], *, x: str, label: str) -> None:
    """Put a point for each row over its number ``x``; points of one ``label`` are joined and
    named together for a legend. Values are on a logarithmic scale, bars show the intervals, and a
    grey line goes through the points that no other beats in both. Less is better."""
    ordered = sorted(rows, key=lambda r: (r[x], r["value"]))
    best = [r for i, r in enumerate(ordered) if all(r["value"] < o["value"] for o in ordered[:i])]
    axes.plot([r[x] for r in best], [r["value"] for r in best], color="0.8", lw=4, zorder=0)
    names = list(dict.fromkeys(r[label] for r in ordered))
    for number, name in enumerate(names, 1):
        joined = [r for r in ordered if r[label] == name]
        at, values = [r[x] for r in joined], [r["value"] for r in joined]
        errors = [
            [max(0.0, r["value"] - r["interval"][0]) for r in joined],
            [max(0.0, r["interval"][1] - r["value"]) for r in joined],
        ]
        axes.errorbar(
            at, values, yerr=errors, marker="o", capsize=2, lw=1, label=f"{number}  {name}"
        )
        for place, value in zip(at, values, strict=True):
            axes.annotate(str(number), (place, value), textcoords="offset points", xytext=(5, 3))
    axes.set(yscale="log", xlabel=x, ylabel=f"{rows[0]['metric']} ({rows[0]['unit']})")


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities, which JSON has not, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value

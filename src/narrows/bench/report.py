"""Rows of results: built in one shape, written as JSON Lines, printed as a table, drawn."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from narrows.errors import ConfigError, InputError

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


def with_provenance(rows: Iterable[Row], facts: Mapping[str, Any]) -> list[Row]:
    """The rows, each with the facts of its run (see ``provenance``)."""
    return [{**r, **facts} for r in rows]


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line, whole or not at all. A number that is not finite becomes
    null. Raises InputError if the file cannot be written."""
    write_whole(path, "".join(json.dumps(_finite(r), ensure_ascii=False) + "\n" for r in rows))


def write_whole(path: Path, text: str) -> None:
    """Put ``text`` in ``path`` at once: readers see the old file or the new one. Raises
    InputError if it cannot be written."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from None


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


def draw(rows: Sequence[Row], path: Path, *, x: str, panel: str, series: str = "method") -> None:
    """Draw the rows as a PNG: a panel for each value of ``panel``, in it a line for each value
    of ``series`` over ``x``, bars showing the intervals.

    Raises ConfigError without matplotlib or without rows, InputError if it cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install narrows[bench]") from None
    panels = list(dict.fromkeys(r[panel] for r in rows))
    if not panels:
        raise ConfigError(f"there are no rows to draw in {path}")
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
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
        axes.set(title=name, xlabel=x, ylabel=f"{inside[0]['metric']} ({inside[0]['unit']})")
        axes.set_xticks(range(len(places)), places)
        axes.legend(fontsize="x-small")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities, which JSON has not, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value

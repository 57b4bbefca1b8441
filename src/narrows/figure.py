"""Pictures as PNG files, by matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrows.errors import ConfigError, InputError


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install narrows[bench]") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG. Raises InputError if that fails."""
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None

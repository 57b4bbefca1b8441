"""The picture of ``narrows bench latent``: what keys and values each are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narrows.bench.report import Row, plot_points
from narrows.errors import ConfigError
from narrows.figure import new_figure, save_figure

MAPPED = "perplexity_ratio"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a PNG: for each preset and source of text a map of the perplexity over the base's, by
    sizes of keys and of values; and divergence over bits for a number of the base's cache, of all
    models and caches measured behind a prompt. A part that was not measured is left out.

    Raises ConfigError without matplotlib or without rows, InputError if it cannot be written.
    """
    maps = [r for r in rows if r["metric"] == MAPPED and r["preset"] is not None]
    presets, sources = (list(dict.fromkeys(r[name] for r in maps)) for name in ("preset", "source"))
    # The base itself, and what equals it, has no divergence to draw on a logarithmic scale.
    points = [r for r in rows if (r["part"], r["metric"]) == ("quality", "kl") and r["value"] > 0]
    if not maps and not points:
        raise ConfigError(f"there are no rows to draw in {path}")
    columns = len(presets) + bool(points)
    figure = new_figure(5.5 * columns, 4.5 * max(1, len(sources)) + bool(points))
    grid = figure.add_gridspec(max(1, len(sources)), columns)
    worst = max((r["value"] for r in maps), default=1.0)
    for x, preset in enumerate(presets):
        for y, source in enumerate(sources):
            chosen = [r for r in maps if (r["preset"], r["source"]) == (preset, source)]
            axes = figure.add_subplot(grid[y, x])
            _map(axes, chosen, worst)
            axes.set_title(f"{preset}: perplexity over the base's, {source.partition('/')[0]}")
    if points:
        axes = figure.add_subplot(grid[:, -1])
        plot_points(axes, points, x="true_bits", label="method")
        axes.set_title("divergence behind a prompt")
        figure.legend(loc="outside lower center", fontsize="small", ncols=2 * columns)
    save_figure(figure, path)


def _map(axes: Any, rows: Sequence[Row], worst: float) -> None:
    """Cells coloured by the logarithm of the rows' values, from 1 to ``worst``; keys upwards,
    values to the right."""
    keys, values = (sorted({r[name] for r in rows}) for name in ("qk", "vo"))
    cells = [[math.nan] * len(values) for _ in keys]
    for r in rows:
        y, x = keys.index(r["qk"]), values.index(r["vo"])
        cells[y][x] = math.log(r["value"])
        told = {"facecolor": "white", "alpha": 0.7, "linewidth": 0}
        axes.text(x, y, f"{r['value']:.3g}", ha="center", va="center", bbox=told)
    axes.imshow(
        cells, origin="lower", cmap="viridis_r", aspect="auto", vmin=0, vmax=math.log(worst)
    )
    axes.set_xticks(range(len(values)), values)
    axes.set_yticks(range(len(keys)), keys)
    axes.set(xlabel="numbers of a value head", ylabel="numbers of a key head")

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
    mapped = [r for r in rows if r["metric"] == MAPPED and r["preset"] is not None]
    kinds = list(dict.fromkeys((r["preset"], r["source"]) for r in mapped))
    # The base itself, and what equals it, has no divergence to draw on a logarithmic scale.
    told = [r for r in rows if (r["part"], r["metric"]) == ("quality", "kl") and r["value"] > 0]
    panels = len(kinds) + bool(told)
    if not panels:
        raise ConfigError(f"there are no rows to draw in {path}")
    figure = new_figure(5.5 * panels, 6.5)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each, (preset, source) in zip(axes, kinds, strict=False):
        chosen = [r for r in mapped if (r["preset"], r["source"]) == (preset, source)]
        _map(each, chosen)
        each.set_title(f"{preset}: perplexity over the base's, {source.partition('/')[0]}")
    if told:
        plot_points(axes[-1], told, x="true_bits", label="method")
        axes[-1].set_title("divergence at equal bytes")
        figure.legend(loc="outside lower center", fontsize="small", ncols=2 * panels)
    save_figure(figure, path)


def _map(axes: Any, rows: Sequence[Row]) -> None:
    """Cells coloured by the logarithm of the rows' values, keys upwards, values to the right."""
    keys, values = (sorted({r[name] for r in rows}) for name in ("qk", "vo"))
    found = {(r["qk"], r["vo"]): r["value"] for r in rows}
    cells = [[math.log(found.get((k, v), math.nan)) for v in values] for k in keys]
    axes.imshow(cells, origin="lower", cmap="viridis_r", aspect="auto")
    for y, k in enumerate(keys):
        for x, v in enumerate(values):
            if (k, v) in found:
                axes.text(x, y, f"{found[k, v]:.3g}", ha="center", va="center", color="0.5")
    axes.set_xticks(range(len(values)), values)
    axes.set_yticks(range(len(keys)), keys)
    axes.set(xlabel="numbers of a value head", ylabel="numbers of a key head")

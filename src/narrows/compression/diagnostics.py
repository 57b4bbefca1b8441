"""What a curious user may ask of a compression: pure functions on scores and choices."""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narrows.compression.attn_norm import average_ranks

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def pearson(a: Floats, b: Floats) -> float | None:
    """Linear correlation; None where it is undefined (under two values, or one side constant)."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: Floats, b: Floats) -> float | None:
    """Correlation of ranks, ties sharing their mean rank; None where it is undefined."""
    return pearson(average_ranks(a), average_ranks(b))


def effective_weight(attention: Floats, surprisal: Floats, alpha: float) -> float | None:
    """Share of the additive score's variance that attention brings, from the two *scaled* signals.

    One outlier squeezes a min-max scaled signal, so this can lie far below ``alpha``. None if
    neither signal varies."""
    by_attention = float(np.var(alpha * attention)) if len(attention) else 0.0
    by_surprisal = float(np.var((1.0 - alpha) * surprisal)) if len(surprisal) else 0.0
    total = by_attention + by_surprisal
    return by_attention / total if total > 0 else None


def entropy_shift(before: Floats, after: Floats) -> dict[str, float | None]:
    """How far the survivors' surprisal moved when others were deleted: mean |difference| in nats
    and the correlation of the two."""
    mean = float(np.abs(after - before).mean()) if len(before) else None
    return {"mean_abs": mean, "pearson": pearson(before, after)}


def kept_by_decile(kept: Mask) -> list[float | None]:
    """Share of tokens kept in each tenth of the text (None for a tenth without tokens)."""
    parts = np.array_split(kept, 10)
    return [float(part.mean()) if len(part) else None for part in parts]


def deleted_runs(kept: Mask) -> dict[str, float]:
    """Longest and mean run of neighbouring deleted tokens, and the number of runs."""
    edges = np.flatnonzero(np.diff(np.concatenate(([True], kept, [True])).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    if not len(lengths):
        return {"count": 0, "max": 0, "mean": 0.0}
    return {"count": len(lengths), "max": int(lengths.max()), "mean": float(lengths.mean())}


def peak_bytes(device: torch.device) -> int:
    """Most memory this process has held so far: of the device's on CUDA, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def of_choice(kept: Mask, forced: Mask, budget: int, device: torch.device) -> dict[str, Any]:
    """Diagnostics of a finished choice; ``kept`` and ``forced`` are bool ``[tokens]``."""
    return {
        "kept_by_decile": kept_by_decile(kept),
        "deleted_runs": deleted_runs(kept),
        "forced_share": float(forced.sum()) / budget if budget else None,
        "peak_bytes": peak_bytes(device),
    }

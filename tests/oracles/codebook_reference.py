"""A codebook the slow way: one vector after the other, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ops.cover import greedy_cover_torch


def entries_of(x: Tensor, theta: float, sizes: list[int], reach: int | None = None) -> Tensor:
    """The vector that stands for each of ``x`` ``[n, dim]``, int64 ``[n]``, if they come in runs of
    ``sizes``: of the newest ``reach`` entries there are before a run (None: of all) the one most
    like it, if alike; else what the greedy cover of the run's others says."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    owner = torch.full((len(x),), -1)
    entries: list[int] = []
    start = 0
    for size in sizes:
        known = entries if reach is None else entries[-reach:]
        rest = []
        for i in range(start, start + size):
            cosines = {j: float(unit[i] @ unit[j]) for j in known}
            best = max(cosines, key=cosines.__getitem__, default=None)
            if best is not None and cosines[best] > theta:
                owner[i] = best
            else:
                rest.append(i)
        alike = (unit[rest] @ unit[rest].T > theta).fill_diagonal_(True)
        for i, j in zip(rest, greedy_cover_torch(alike).tolist(), strict=True):
            owner[i] = rest[j]
        entries += sorted({int(owner[i]) for i in rest})
        start += size
    return owner

"""Weights in huge pages: those of usual size are so many that the processor keeps looking up where
they lie, which takes a tenth of the time of reading them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LINE = 64
"""Bytes, at a multiple of which each tensor begins."""


def gathered(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For each of ``groups``, a new tensor of its tensors one below the other, which are of one
    dtype, and alike but for their first size. All lie in one stretch of memory, in huge pages
    where the system has them."""
    sizes = [sum(x.nbytes for x in group) for group in groups]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // LINE) * LINE)
    memory = _memory(starts[-1])
    made = []
    for group, start, size in zip(groups, starts, sizes, strict=False):
        first = group[0]
        rows = sum(len(x) for x in group)
        whole = memory[start : start + size].view(first.dtype).view(rows, *first.shape[1:])
        torch.cat(list(group), out=whole)
        made.append(whole)
    return made


def _memory(size: int) -> Tensor:
    """So many bytes."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < mmap.PAGESIZE:
        return torch.empty(size, dtype=torch.uint8)
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a system without them
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(held, dtype=torch.uint8)

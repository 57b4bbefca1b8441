"""Weights in huge pages: those of usual size are so many that the processor keeps looking up where
they lie, which makes reading them slower."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LINE = 64
"""Bytes, at a multiple of which each tensor begins."""


def reserve(wanted: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """New tensors of these shapes and dtypes, whose numbers are yet to be written: a page takes no
    memory before. All lie in one stretch, in huge pages where the system has them."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // LINE) * LINE)
    memory = _memory(starts[-1])
    return [
        memory[start : start + size].view(dtype).view(*shape)
        for (shape, dtype), start, size in zip(wanted, starts, sizes, strict=False)
    ]


def _memory(size: int) -> Tensor:
    """So many bytes."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < mmap.PAGESIZE:
        return torch.empty(size, dtype=torch.uint8)
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a system without them
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(held, dtype=torch.uint8)

"""What the machine can do and what a call used: read bandwidth, peak memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from narrows.ops.native import linear
from narrows.ops.pages import reserve

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the distinct parameters of a model: what one decoding step must read. Tied
    weights count once; parameters that are views into one storage count by their own size."""
    sizes = {(p.data_ptr(), p.shape): p.numel() * p.element_size() for p in model.parameters()}
    return sum(sizes.values())


def read_bandwidth(device: torch.device, *, size: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second that a matrix-vector product reads from memory: the better of torch's in
    float32 and ours in bfloat16, each the median of ``repeats``. ``size`` bytes of float32 should
    exceed every cache several times. On the CPU the matrix lies in huge pages, as weights do."""
    shape = max(1, size // (4 * 4096)), 4096
    wanted = [(shape, torch.float32), (shape, torch.bfloat16)]
    if device.type == "cpu":
        matrices = reserve(wanted)
    else:
        matrices = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in wanted]
    vector = torch.ones(1, 4096, device=device)
    best = 0.0
    for read in matrices:
        read.fill_(1)
        speeds = []
        for number in range(repeats + 1):
            started = time.perf_counter()
            product = linear(vector, read)
            float(product[0, 0])  # waits for an accelerator
            if number:  # the first one also loads the kernel
                speeds.append(read.nbytes / (time.perf_counter() - started))
        best = max(best, median(speeds))
    return best


def most_memory() -> int:
    """Bytes of the most memory that this process has held. Raises OSError where the system cannot
    tell."""
    return _status("VmHWM")


def added_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which the peak during ``call`` exceeded what was held before: of the process on
    the CPU, of torch's allocator on CUDA. None where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    try:
        _give_back_free_memory()
        CLEAR.write_text("5")  # the kernel's way to start the peak afresh
        before = _status("VmRSS")
    except OSError:
        return None
    call()
    return max(0, most_memory() - before)


def _give_back_free_memory() -> None:
    """What earlier work freed may still be the process's; a call that uses it again would seem
    to need nothing. The C library of Linux gives it back on request."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")

"""How much memory is free for caches, and what garbage collections leave alone."""

from __future__ import annotations

import gc
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes free on ``device``; on the CPU what the kernel calls available, less where a
    control group allows less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _meminfo("MemAvailable")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return available
    return max(0, min(available, limit - used))


def settle() -> None:
    """Have garbage collections leave alone, for good, what this process holds now: for one that is
    to generate and has all it needs. A full collection looks at every object of the libraries that
    are loaded, which takes as long as many steps, and comes in the middle of one."""
    gc.collect()
    gc.freeze()


def _meminfo(field: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # not Linux: a size every supported machine has

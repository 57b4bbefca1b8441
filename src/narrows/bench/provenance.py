"""What a measured number depends on besides the code: command, commit, versions, processor."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("narrows", "torch", "transformers", "tokenizers", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8")
"""Processor features that decide which matrix kernels run."""


def provenance(seed: int) -> dict[str, Any]:
    """The fields every row carries: ``command``, ``commit`` (None outside a checkout),
    ``versions``, ``machine`` and ``seed``."""
    return {
        "seed": seed,
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }


def command() -> str:
    """The command line of this process, quoted for a shell, program by its name alone."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def commit() -> str | None:
    """The git commit of the source this runs from, with ``+`` if files differ from it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        tracked = git("ls-files", "--error-unmatch", str(Path(__file__)))
        head = git("rev-parse", "HEAD") if tracked else ""
        return head + ("+" if git("status", "--porcelain", "-uno") else "") if head else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def versions() -> dict[str, str]:
    """Versions of the interpreter and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor model, the FLAGS it has, its cores, torch's threads and the accelerator."""
    import torch

    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": info.get("model name", platform.processor()),
        "flags": [f for f in FLAGS if f in flags],
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):  # counts what this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}

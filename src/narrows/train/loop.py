"""One training loop: AdamW on float32 weights, warm-up and cosine, checkpoints to go on from.

Started by ``accelerate launch``, several processes share each update: every one adds the gradients
of a batch of its own, and all go on with their mean.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from narrows.config import Settings
from narrows.errors import InputError, NumericalError
from narrows.files import replacing

CHECKPOINT, HISTORY = "checkpoint.safetensors", "history.jsonl"


class LoopOptions(Settings):
    """``steps`` updates in all; the rate rises for the first ``warmup`` share of them and falls
    by a cosine to ``final`` of itself. Gradients are clipped to ``clip``. A checkpoint is written
    every ``save_every`` steps and at the end."""

    steps: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0.0)] = 6e-4
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    final: Annotated[float, Field(ge=0.0, le=1.0)] = 0.02
    decay: Annotated[float, Field(ge=0.0)] = 0.01
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    save_every: Annotated[int, Field(ge=1)] = 50


def rate_at(options: LoopOptions, step: int) -> float:
    """Learning rate of update ``step``, from 0."""
    rising = max(1, round(options.warmup * options.steps))
    if step < rising:
        return options.rate * (step + 1) / rising
    done = (step - rising) / max(1, options.steps - rising)
    low = options.rate * options.final
    return low + (options.rate - low) * (1 + math.cos(math.pi * done)) / 2


def chosen(step: int, count: int, batch: int, seed: int) -> list[int]:
    """The examples of update ``step``, out of ``count``: all of them in a new random order, again
    and again."""
    found = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(place, count)
        found.append(_order(count, seed * 1_000_003 + epoch)[at])
    return found


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def processes(device: torch.device | str | None) -> PartialState:
    """Those that ``accelerate launch`` started to train on ``device`` (None: CUDA where there is
    any), or this one alone. Called before anything is put on a GPU, it also gives each its own."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    return PartialState(cpu=kind == "cpu")


def train(
    module: nn.Module,
    gradients: Callable[[int], dict[str, float]],
    folder: Path,
    options: LoopOptions,
    *,
    data: str,
    check: Callable[[], dict[str, float]] | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, told: None,
) -> list[dict[str, Any]]:
    """Train ``module`` in place; returns the history, a row an update.

    Args:
        module: float32 parameters; those that require gradients are trained.
        gradients: adds one batch's gradients, by number of the batch, and tells of it.
        folder: holds the checkpoint and the history; a run found there goes on.
        options: see LoopOptions.
        data: names what is trained on; a checkpoint of another name is not gone on from.
        check: measured at every checkpoint, by the first process.
        on_step: called after every update.

    Raises InputError for a checkpoint of other data or sizes, NumericalError for a loss or
    gradients that are not finite; the last checkpoint then stays as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
    crew = processes(next(iter(weights.values())).device)
    machine = torch.optim.AdamW(weights.values(), betas=(0.9, 0.95), weight_decay=options.decay)
    start = _resume(folder, weights, machine, data, options)
    crew.wait_for_everyone()  # the first process rewrites the history below
    history = _history(folder, start, write=crew.is_main_process)
    for step in range(start, options.steps):
        for group in machine.param_groups:
            group["lr"] = rate_at(options, step)
        machine.zero_grad()
        told = gradients(step * crew.num_processes + crew.process_index)
        if crew.num_processes > 1:
            told = _shared(weights, told)
        norm = float(nn.utils.clip_grad_norm_(weights.values(), options.clip))
        if not all(map(math.isfinite, (norm, *told.values()))):
            raise NumericalError(
                f"step {step}: the loss or its gradients are not finite; lower the rate"
            )
        machine.step()
        row: dict[str, Any] = {"step": step, "rate": rate_at(options, step), "norm": norm, **told}
        if crew.is_main_process:
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                if check is not None:
                    row |= check()
                _save(folder, weights, machine, step + 1, data, options)
            with (folder / HISTORY).open("a") as file:
                file.write(json.dumps(row) + "\n")
        history.append(row)
        on_step(step, row)
    return history


def _shared(weights: dict[str, nn.Parameter], told: dict[str, float]) -> dict[str, float]:
    """Make every gradient, and what is told, the mean over all processes."""
    for p in weights.values():
        own = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = reduce(own, "mean")
    device = next(iter(weights.values())).device
    mean: Tensor = reduce(torch.tensor(list(told.values()), device=device), "mean")
    return dict(zip(told, mean.tolist(), strict=True))


def _save(
    folder: Path,
    weights: dict[str, nn.Parameter],
    machine: torch.optim.Optimizer,
    step: int,
    data: str,
    options: LoopOptions,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, p in weights.items():
        state = machine.state[p]
        tensors[f"weight.{name}"] = p.detach()
        tensors[f"first.{name}"], tensors[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
    told = {"step": str(step), "data": data, "steps": str(options.steps)}
    with replacing(folder / CHECKPOINT) as beside:
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside, metadata=told)


def _resume(
    folder: Path,
    weights: dict[str, nn.Parameter],
    machine: torch.optim.Optimizer,
    data: str,
    options: LoopOptions,
) -> int:
    """Load the checkpoint in ``folder`` if there is one; the step to go on with."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise InputError(f"{path} is damaged ({error}); delete it to start again") from None
    if told.get("data") != data:
        raise InputError(
            f"{path} was trained on other data; give another folder, or the data it had"
        )
    wanted = {f"weight.{name}": p.shape for name, p in weights.items()}
    if {n: t.shape for n, t in tensors.items() if n.startswith("weight.")} != wanted:
        raise InputError(f"{path} belongs to a module of other sizes; give another folder")
    step = int(told["step"])
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(tensors[f"weight.{name}"])
            machine.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"first.{name}"].clone(),
                "exp_avg_sq": tensors[f"second.{name}"].clone(),
            }
    return step


def _history(folder: Path, steps: int, *, write: bool) -> list[dict[str, Any]]:
    """The first ``steps`` rows that were written; later ones, of a run that was stopped before
    its checkpoint, are cut off, in the file too if ``write``."""
    path = folder / HISTORY
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()][:steps]
    if not write:
        return rows
    with replacing(path) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows

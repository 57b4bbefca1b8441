"""Heals a converted model: layer by layer, then as a whole (arXiv 2507.11273, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrize

from narrows.cache.dense import DensePolicy
from narrows.contracts import FlatBatch
from narrows.errors import ConfigError
from narrows.figure import new_figure, save_figure
from narrows.model.flat import FlatModel
from narrows.train.loop import LoopOptions, chosen, train

Stage = Literal["layers", "whole"]
ROWS = 256
"""Rows of logits held at once."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """LoRA as a parametrisation of a weight ``[out, in]``: ``scale * b @ a`` is added, at first 0
    (paper, section 3.3.1: on the three weights of each MLP, rank 256, scale 2)."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = scale
        self.a = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is used."""
        return weight + (self.scale * self.b @ self.a).to(weight.dtype)


def prepare(student: Any, *, rank: int, alpha: float) -> None:
    """Free what the paper trains: queries, keys, values and outputs in full, the MLPs by LoRA of
    ``rank`` (0: not at all) scaled by ``alpha / rank``. Trained weights are float32."""
    student.requires_grad_(False)
    for layer in student.base_model.layers:
        layer.self_attn.float().requires_grad_(True)
        if rank:
            for name in PROJECTIONS:
                linear = getattr(layer.mlp, name)
                added = LowRank(linear.weight, rank, alpha / rank)
                parametrize.register_parametrization(linear, "weight", added)


def merge(student: Any) -> None:
    """Fold LoRA into the weights, so that nothing of it is left, and give all of them one dtype."""
    for layer in student.base_model.layers:
        layer.self_attn.to(layer.mlp.down_proj.weight.dtype)
        for name in PROJECTIONS:
            if parametrize.is_parametrized(linear := getattr(layer.mlp, name)):
                parametrize.remove_parametrizations(linear, "weight")


class LatentObjective:
    """Gradients of one stage.

    Stage ``layers``: each layer is given what the teacher's layer was given, and is to make of it
    what the teacher's made, by mean squared error (formula 7), what the last makes behind the
    final norm. Stage ``whole``: the divergence of the student's next-token distribution
    from the teacher's (``kl``, formula 9, at temperature 1 and averaged over tokens), or
    cross-entropy with the text (``text``, formula 8).

    Args:
        student: a converted transformers model; see ``prepare``.
        teacher: the base model.
        windows: token ids of equal number.
        batch: windows of a step.
        seed: of their order.
    """

    def __init__(
        self,
        student: Any,
        teacher: FlatModel,
        windows: Sequence[Sequence[int]],
        stage: Stage,
        *,
        loss: Literal["kl", "text"] = "kl",
        batch: int = 2,
        seed: int = 0,
    ) -> None:
        self.student, self.teacher, self.windows = student, teacher, windows
        self.stage, self.loss, self.batch, self.seed = stage, loss, batch, seed
        self.narrow = teacher.shape.dtype is torch.bfloat16
        self.device = teacher.shape.device
        head = student.get_output_embeddings().weight.detach()
        self.head = head.bfloat16() if self.narrow else head

    def chosen(self, step: int) -> Tensor:
        """Token ids ``[batch, length]`` of a step: all windows in a new order, again and again."""
        order = chosen(step, len(self.windows), self.batch, self.seed)
        return torch.tensor([list(self.windows[i]) for i in order], device=self.device)

    def gradients(self, step: int) -> dict[str, float]:
        """Add those of a step's windows; tells the mean loss."""
        ids = self.chosen(step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.narrow):
            told = self._layers(ids) if self.stage == "layers" else self._whole(ids)
        return {"loss": told, "tokens": float(ids.numel())}

    def _states(self, ids: Tensor, taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of the teacher over windows ``[n, length]``: final states ``[n, length, hidden]``, and
        those that enter the layers ``taps`` ``[n, length, taps, hidden]``; float32."""
        count, length = ids.shape
        spans = [(i * length, (i + 1) * length) for i in range(count)]
        caches = [DensePolicy().build(self.teacher.shape) for _ in spans]
        places = torch.arange(length, device=ids.device).repeat(count)
        batch = FlatBatch(spans, caches)
        final, seen = self.teacher.hidden_and_taps(ids.flatten(), places, batch, taps)
        # Copied: what inference mode made cannot be part of a graph.
        final, seen = (x.float().clone().view(count, length, *x.shape[1:]) for x in (final, seen))
        return final, seen

    def _layers(self, ids: Tensor) -> float:
        layers, base = self.student.base_model.layers, self.student.base_model
        count = len(layers)
        _, seen = self._states(ids, range(count + 1))
        total = 0.0

        def give(number: int) -> Callable[..., Any]:
            def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
                entered = seen[:, :, number]
                if args:
                    return (entered, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": entered}

            return hook

        def judge(number: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, made: Any) -> None:
                nonlocal total
                states = made[0] if isinstance(made, tuple) else made
                if number + 1 == count:
                    states = base.norm(states)
                loss = mse_loss(states.float(), seen[:, :, number + 1]) / count
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())

            return hook

        hooks = [
            hook
            for number, layer in enumerate(layers)
            for hook in (
                layer.register_forward_pre_hook(give(number), with_kwargs=True),
                layer.register_forward_hook(judge(number)),
            )
        ]
        try:
            base(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return total

    def _whole(self, ids: Tensor) -> float:
        made = self.student.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if self.loss == "kl":
            goal, _ = self._states(ids, (0,))
            rows, goal = made.flatten(0, 1), goal.flatten(0, 1)
            total, slope = self._divergence(rows.detach(), goal)
        else:
            rows = made[:, :-1].flatten(0, 1)
            total, slope = self._surprisal(rows.detach(), ids[:, 1:].flatten())
        rows.backward(slope.to(rows.dtype))
        return total

    @torch.no_grad()
    def _divergence(self, rows: Tensor, goal: Tensor) -> tuple[float, Tensor]:
        """Mean KL divergence, in nats, of the distributions behind states ``rows`` ``[n, hidden]``
        from those behind ``goal``, and its gradient with respect to ``rows``: made by hand, the
        difference of the probabilities times the head, for autograd would hold all logits."""
        slope, total = torch.empty_like(rows, dtype=torch.float32), 0.0
        for part in torch.split(torch.arange(len(rows), device=rows.device), ROWS):
            given = self._logits(rows[part]).log_softmax(-1)
            wanted = self._logits(goal[part]).log_softmax(-1)
            taught = wanted.exp()
            total += float((taught * (wanted - given)).sum())
            slope[part] = self._pull(given.exp_().sub_(taught)) / len(rows)
        return total / len(rows), slope

    @torch.no_grad()
    def _surprisal(self, rows: Tensor, truth: Tensor) -> tuple[float, Tensor]:
        """As ``_divergence``, from the one-hot distributions of tokens ``truth`` ``[n]``."""
        slope, total = torch.empty_like(rows, dtype=torch.float32), 0.0
        for part in torch.split(torch.arange(len(rows), device=rows.device), ROWS):
            given = self._logits(rows[part]).log_softmax(-1)
            at = truth[part][:, None]
            total -= float(given.gather(1, at).sum())
            given.exp_().scatter_add_(1, at, torch.full_like(at, -1.0, dtype=given.dtype))
            slope[part] = self._pull(given) / len(rows)
        return total / len(rows), slope

    def _logits(self, states: Tensor) -> Tensor:
        scores: Tensor = states.to(self.head.dtype) @ self.head.T
        return scores.float()

    def _pull(self, weights: Tensor) -> Tensor:
        pulled: Tensor = weights.to(self.head.dtype) @ self.head
        return pulled.float()

    @torch.no_grad()
    def check(self, windows: Sequence[Sequence[int]]) -> dict[str, float]:
        """On ``windows`` not trained on: ``kl`` from the teacher and mean surprisal of the text
        under both, ``nll`` and ``base_nll``; nats a token."""
        sums = {"kl": 0.0, "nll": 0.0, "base_nll": 0.0}
        for window in windows:
            ids = torch.tensor([list(window)], device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.narrow):
                made = self.student.base_model(input_ids=ids, use_cache=False).last_hidden_state
                goal, _ = self._states(ids, (0,))
                rows, goal = made[0, :-1], goal[0, :-1]
                truth = ids[0, 1:]
                sums["kl"] += self._divergence(rows, goal)[0]
                sums["nll"] += self._surprisal(rows, truth)[0]
                sums["base_nll"] += self._surprisal(goal, truth)[0]
        return {name: total / len(windows) for name, total in sums.items()}


def heal(
    student: Any,
    teacher: FlatModel,
    windows: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    work: Path,
    *,
    data: str,
    stages: Sequence[tuple[Stage, LoopOptions]],
    loss: Literal["kl", "text"] = "kl",
    rank: int = 0,
    alpha: float = 512.0,
    batch: int = 2,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Train ``student`` in place through ``stages``; returns their histories, each row with its
    ``stage``. What is half done in ``work`` is gone on from.

    Args:
        student: a converted model, from ``narrows.latent.checkpoint.load``.
        teacher: the base model, of the same tokens.
        windows: token ids, of equal number, to learn from.
        held: the like, to measure on.
        data: names the windows.
        rank, alpha: of LoRA on the MLPs, see ``prepare``.
        loss, batch, seed: see LatentObjective.

    Raises ConfigError for a teacher of other sizes, and as ``train`` does.
    """
    check_teacher(student.config, teacher)
    torch.manual_seed(seed)
    prepare(student, rank=rank, alpha=alpha)
    histories = []
    for stage, options in stages:
        objective = LatentObjective(
            student, teacher, windows, stage, loss=loss, batch=batch, seed=seed
        )
        history = train(
            student,
            objective.gradients,
            work / stage,
            options,
            data=f"{teacher.fingerprint} {data} {stage} {loss} {rank} {batch} {seed}",
            check=lambda objective=objective: objective.check(held),  # type: ignore[misc]
            on_step=lambda step, told: on_step(),
        )
        histories += [{"stage": stage, **row} for row in history]
    merge(student)
    seen = sum(row["tokens"] for row in histories)
    student.config.kv_latent = {
        **student.config.kv_latent,
        "trained_tokens": student.config.kv_latent["trained_tokens"] + int(seen),
    }
    return histories


def check_teacher(config: Any, teacher: FlatModel) -> None:
    """Raises ConfigError for a teacher that the model of ``config`` cannot have been made from."""
    shape = teacher.shape
    ours = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
    if ours != (len(shape.layers), shape.hidden_size, shape.vocab_size):
        raise ConfigError(
            f"{teacher.name} has other sizes than the converted model; name the model it was "
            "converted from with --teacher"
        )


def draw(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss of each stage over its tokens, and divergence from the teacher where it was measured.
    Raises as ``new_figure`` and ``save_figure``."""
    stages = list(dict.fromkeys(row["stage"] for row in history))
    figure = new_figure(3.7 * (len(stages) + 1), 4.5)
    *losses, right = figure.subplots(1, len(stages) + 1)
    for axes, stage in zip(losses, stages, strict=True):
        rows = [row for row in history if row["stage"] == stage]
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=0.8)
        axes.set(title=stage, xlabel="update", ylabel="loss")
    tokens, seen = [], 0.0
    for row in history:
        seen += row["tokens"]
        tokens.append(seen / 1e6)
    at = [i for i, row in enumerate(history) if "kl" in row]
    right.plot([tokens[i] for i in at], [history[i]["kl"] for i in at], "-o", ms=3)
    right.set(title="held out", xlabel="million tokens", ylabel="nats from the base", ylim=0)
    save_figure(figure, path)

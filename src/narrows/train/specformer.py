"""Trains a SpecFormer on its target's own answers (arXiv 2511.20340; sheet section 5)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from narrows.cache.dense import DensePolicy
from narrows.contracts import FlatBatch
from narrows.draft.specformer import SpecFormer, SpecFormerConfig
from narrows.errors import InputError
from narrows.figure import new_figure, save_figure
from narrows.llm import LLM
from narrows.model.flat import FlatModel
from narrows.train.examples import Example, answer_all
from narrows.train.loop import LoopOptions, train

ROWS = 512
"""Rows of logits held at once."""


HELD_OUT = 0.05
"""Share of the examples that is measured on, not trained on."""


def run(
    llm: LLM,
    prompts: Sequence[str],
    out: Path,
    options: LoopOptions,
    *,
    module: SpecFormer | None = None,
    slots: int = 4,
    max_tokens: int = 256,
    batch_tokens: int = 4096,
    seed: int = 0,
    on_answers: Callable[[int], None] = lambda count: None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, told: None,
) -> list[dict[str, Any]]:
    """Let ``llm`` answer the prompts, train a drafter on the answers, write it to ``out`` and
    return the history. What is half done in ``out`` is gone on from.

    Args:
        llm: the target; it stays as it is.
        prompts: what it answers, greedily, up to ``max_tokens`` tokens each.
        out: gets the drafter; its ``work`` folder the answers, checkpoints and history.
        options: of the loop.
        module: goes on from this one; None starts anew with ``slots`` slots.
        batch_tokens: of a step, about.

    Raises InputError, ModelError or NumericalError as ``answer_all`` and ``train`` do.
    """
    target, work = llm.model, out / "work"
    answers = work / "answers"
    examples = answer_all(llm, prompts, answers, max_tokens=max_tokens, on_done=on_answers)
    held = max(1, round(HELD_OUT * len(examples)))
    if held >= len(examples):
        raise InputError(f"{len(examples)} answered prompts are too few to train on; give more")
    torch.manual_seed(seed)
    module = module or SpecFormer(SpecFormerConfig.of(target, slots=slots))
    objective = SpecFormerObjective(
        module, target, examples[:-held], tokens=batch_tokens, seed=seed
    )
    told = hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]
    history = train(
        module,
        objective.gradients,
        work,
        options,
        data=f"{target.fingerprint} {told} {max_tokens} {batch_tokens} {seed}",
        check=lambda: objective.check(examples[-held:]),
        on_step=on_step,
    )
    module.save(out)
    return history


def draw(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over the updates, and where it was measured, the tokens a step would commit and how
    often each slot is right with those before it. Raises as ``new_figure`` and ``save_figure``."""
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in history]
    left.plot(steps, [row["loss"] for row in history], label="all slots", lw=0.8)
    left.plot(steps, [row["first"] for row in history], label="first slot", lw=0.8)
    left.set(xlabel="update", ylabel="loss (nats)")
    left.legend()
    measured = [row for row in history if "kappa" in row]
    places = [row["step"] for row in measured]
    right.plot(places, [row["kappa"] for row in measured], "k-o", ms=3, label="tokens a step")
    for name in sorted({name for row in measured for name in row if name.startswith("right")}):
        right.plot(places, [row[name] for row in measured], "-o", ms=2, label=f"slot {name[5:]}")
    right.set(xlabel="update", ylabel="held out, teacher-forced")
    right.legend(fontsize="small")
    save_figure(figure, path)


class SpecFormerObjective:
    """Cross-entropy of every slot, all slots alike, on the tokens of the answers.

    Args:
        module: trained in place; float32.
        target: frozen.
        examples: what it learns from.
        tokens: of examples a step reads, about.
        seed: of the order of examples.
    """

    def __init__(
        self,
        module: SpecFormer,
        target: FlatModel,
        examples: Sequence[Example],
        *,
        tokens: int = 4096,
        seed: int = 0,
    ) -> None:
        self.module, self.target, self.examples = module, target, examples
        self.tokens, self.seed = tokens, seed
        mean = sum(len(e.tokens) for e in examples) / len(examples)
        self.batch = max(1, min(len(examples), round(tokens / mean)))

    def chosen(self, step: int) -> list[Example]:
        """The examples of a step: all of them in a new random order, again and again."""
        found, count = [], len(self.examples)
        for place in range(step * self.batch, (step + 1) * self.batch):
            epoch, at = divmod(place, count)
            order = list(range(count))
            random.Random(self.seed * 1_000_003 + epoch).shuffle(order)
            found.append(self.examples[order[at]])
        return found

    def gradients(self, step: int) -> dict[str, float]:
        """Add the gradients of a step's examples. The slots' vectors are made once; the loss of
        one slot after the other then goes back to them, and from there through the module, so
        that one slot's logits are held at a time (5.3)."""
        x, labels = self.rows(self.chosen(step))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.narrow):
            slots = self.module.slots(x)
        leaf = slots.detach().float().requires_grad_(True)
        count = int((labels >= 0).sum())
        losses = []
        for slot in range(labels.shape[1]):
            known = (labels[:, slot] >= 0).nonzero()[:, 0]
            total = 0.0
            for rows in torch.split(known, ROWS):
                scores = self.scores(leaf[rows, slot])
                loss = cross_entropy(scores, labels[rows, slot], reduction="sum") / count
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            losses.append(total * count / max(1, len(known)))
        assert leaf.grad is not None
        slots.backward(leaf.grad.to(slots.dtype))  # type: ignore[no-untyped-call]
        return {"loss": sum(losses) / len(losses), "first": losses[0], "tokens": float(len(x))}

    @property
    def narrow(self) -> bool:
        """Whether products are made in bfloat16, as the target's are."""
        return self.target.shape.dtype is torch.bfloat16

    def scores(self, states: Tensor) -> Tensor:
        """The target's logits of ``states`` ``[n, hidden]``, with gradients for the states."""
        normed = self.target.final_norm(states)
        head = self.target.model.get_output_embeddings().weight
        return linear(normed.to(head.dtype), head).float()

    def rows(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Context vectors of the places that drafts start from, ``[n, hidden]`` with gradients,
        and the tokens their slots should name, int64 ``[n, slots]``, -1 behind the end."""
        taps = self.taps(examples)
        longest = max(len(e.tokens) for e in examples)
        padded = taps[0].new_zeros((len(examples), longest, *taps[0].shape[1:]))
        for row, seen in zip(padded, taps, strict=True):
            row[: len(seen)] = seen
        cosine, sine = self.target.rotary(torch.arange(longest, device=padded.device))
        with torch.autocast(padded.device.type, torch.bfloat16, enabled=self.narrow):
            x = self.module(padded, cosine.clone(), sine.clone())
        count = self.module.config.slots
        states, labels = [], []
        for number, example in enumerate(examples):
            # The state at t, whose own token is the target's, forecasts t + 2 and on.
            first, stop = example.start - 1, len(example.tokens) - 2
            states.append(x[number, first:stop])
            coming = torch.tensor([*example.tokens[first + 2 :], *[-1] * (count - 1)])
            labels.append(coming.unfold(0, count, 1))
        return torch.cat(states), torch.cat(labels).to(x.device)

    def taps(self, examples: Sequence[Example]) -> list[Tensor]:
        """The target's hidden states for each example, ``[tokens, taps, hidden]``."""
        target, wanted = self.target, self.module.config.taps
        ends = torch.tensor([len(e.tokens) for e in examples]).cumsum(0).tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        caches = [DensePolicy().build(target.shape) for _ in examples]
        device = target.shape.device
        ids = torch.tensor([t for e in examples for t in e.tokens], device=device)
        places = torch.cat([torch.arange(len(e.tokens)) for e in examples]).to(device)
        _, seen = target.hidden_and_taps(ids, places, FlatBatch(spans, caches), wanted)
        # Copied, since what was made without gradients cannot be part of a graph.
        return [seen[a:b].clone() for a, b in spans]

    def check(self, examples: Sequence[Example]) -> dict[str, float]:
        """Teacher-forced: tokens a step would commit, ``kappa``, drafting all slots at every
        place of ``examples``, and the share of places at which the first ``i`` slots are right."""
        right = []
        with torch.no_grad():
            for first in range(0, len(examples), self.batch):
                x, labels = self.rows(examples[first : first + self.batch])
                slots = self.module.slots(x.float())
                flat = torch.split(slots.flatten(0, 1), ROWS)
                best = torch.cat([self.scores(some).argmax(-1) for some in flat])
                right.append((best.view_as(labels) == labels).cumprod(1).float())
        survive = torch.cat(right).mean(0).tolist()
        told = {f"right{i + 1}": share for i, share in enumerate(survive)}
        return {"kappa": 1 + sum(survive), **told}

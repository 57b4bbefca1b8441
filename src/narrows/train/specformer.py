"""Trains a SpecFormer on its target's own answers (arXiv 2511.20340; sheet section 5)."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from narrows.cache.dense import DensePolicy
from narrows.contracts import FlatBatch
from narrows.draft.specformer import SpecFormer, SpecFormerConfig
from narrows.draft.specformer_drafter import check_target
from narrows.engine.memory import free_bytes
from narrows.errors import ConfigError, InputError
from narrows.figure import new_figure, save_figure
from narrows.llm import LLM
from narrows.model.flat import FlatModel
from narrows.train.examples import ANSWERS, Example, answer_all, digest, given_all
from narrows.train.linear_start import start_linear
from narrows.train.loop import CHECKPOINT, LoopOptions, chosen, processes, train

ROWS = 512
"""Rows of logits held at once."""
KEEP_SHARE = 0.6
"""Of free memory, for hidden states kept from one epoch to the next, so that the target, which
takes longer than all else, runs once."""
LINEAR_EXAMPLES = 800
"""Examples a linear start is fitted to."""
HELD_OUT = 0.05
"""Share of the examples that is measured on, not trained on."""


def run(
    llm: LLM,
    prompts: Sequence[str],
    out: Path,
    options: LoopOptions,
    *,
    module: SpecFormer | None = None,
    given: Sequence[str] | None = None,
    distill: float = 0.0,
    slot_decay: float = 1.0,
    linear_start: bool = False,
    max_tokens: int = 256,
    longest: int = 1024,
    batch_tokens: int = 4096,
    seed: int = 0,
    on_answers: Callable[[int], None] = lambda count: None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, told: None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Let ``llm`` answer the prompts, train a drafter on the answers, write it to ``out`` and
    return the history. What is half done in ``out`` is gone on from.

    Args:
        llm: the target; it stays as it is.
        prompts: what it answers, greedily, up to ``max_tokens`` tokens each.
        out: gets the drafter; its ``work`` folder the answers, checkpoints and history.
        options: of the loop.
        module: goes on from this one; None starts anew.
        given: answers to learn from instead, one a prompt, to see what the target's own are worth
            (5.5); it is still measured on those.
        distill, slot_decay: see SpecFormerObjective.
        linear_start: a new module begins as ``start_linear`` makes it.
        longest: tokens of a prompt with its answer.
        batch_tokens: of a step, about.
        changes: of a new module's config.

    Raises ConfigError for options that do not go together, and as ``answer_all`` and ``train`` do.
    """
    target, work = llm.model, out / "work"
    answers = out / ANSWERS
    crew = processes(target.shape.device)

    def answer(some: Sequence[str]) -> list[Example]:
        return answer_all(
            *(llm, some, answers), max_tokens=max_tokens, longest=longest, on_done=on_answers
        )

    with crew.main_process_first():
        if given is None:
            examples = answer(prompts)
            held = max(1, round(HELD_OUT * len(examples)))
            lessons, checks = examples[:-held], examples[-held:]
        else:
            held = max(1, round(HELD_OUT * len(prompts)))
            lessons = given_all(llm, prompts[:-held], given[:-held], longest=longest)
            on_answers(len(prompts) - held)
            checks = answer(prompts[-held:])
    if not lessons:
        raise InputError(f"{len(checks)} answered prompts are too few to train on; give more")
    torch.manual_seed(seed)
    fresh = module is None
    module = module or new_module(target, lessons, **changes)
    objective = SpecFormerObjective(
        *(module, target, lessons),
        tokens=batch_tokens,
        seed=seed,
        distill=distill,
        slot_decay=slot_decay,
        keep_bytes=int(KEEP_SHARE * free_bytes(target.shape.device) / crew.num_processes),
    )
    if linear_start and module.spread is None:
        raise ConfigError("a linear start needs the positional layer")
    if fresh and linear_start and not (work / CHECKPOINT).exists():
        start_linear(module, target, objective.read(LINEAR_EXAMPLES))
    told = f"{digest([*prompts, *(given or [])])} {max_tokens} {batch_tokens} {seed}"
    history = train(
        module,
        objective.gradients,
        work,
        options,
        data=f"{target.fingerprint} {told} {distill} {slot_decay}",
        check=lambda: objective.check(checks),
        on_step=on_step,
    )
    if crew.is_main_process:
        module.save(out)
    return history


def new_module(target: FlatModel, examples: Sequence[Example], **changes: Any) -> SpecFormer:
    """An untrained module for ``target``, on its device. Raises ConfigError."""
    config = SpecFormerConfig.of(target, **changes)
    check_target(config, target)
    module = SpecFormer(config)
    if config.draft_vocab is not None:
        module.vocabulary = common_tokens(examples, config.draft_vocab, config.vocab_size)
    return module.to(target.shape.device)


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
    """Cross-entropy of every slot on the tokens of the answers, all slots alike by default.

    Args:
        module: trained in place; float32.
        target: frozen.
        examples: what it learns from.
        tokens: of examples a step reads, about.
        seed: of the order of examples.
        distill: share of the loss that is against the target's own distribution over the tokens
            guessed from, in place of the token it chose, an extension; 0 is the paper's.
        slot_decay: what a slot's loss counts against that of the slot before it, an extension: a
            guess is only of use behind right ones. 1 is the paper's.
        keep_bytes: most memory for hidden states of examples, which are kept for later epochs.
    """

    def __init__(
        self,
        module: SpecFormer,
        target: FlatModel,
        examples: Sequence[Example],
        *,
        tokens: int = 4096,
        seed: int = 0,
        distill: float = 0.0,
        slot_decay: float = 1.0,
        keep_bytes: int = 1 << 30,
    ) -> None:
        self.module, self.target, self.examples = module, target, examples
        self.tokens, self.seed, self.distill, self.slot_decay = tokens, seed, distill, slot_decay
        mean = sum(len(e.tokens) for e in examples) / len(examples)
        self.batch = max(1, min(len(examples), round(tokens / mean)))
        self.head = target.head
        self.places = torch.arange(target.shape.vocab_size, device=target.shape.device)
        if module.config.draft_vocab is not None:
            named = module.vocabulary.long()
            self.head = self.head[named].contiguous()
            self.places = torch.full_like(self.places, -1)
            self.places[named] = torch.arange(len(named), device=named.device)
        self._kept: dict[int, Tensor] = {}
        self._room = keep_bytes

    def chosen(self, step: int) -> list[Example]:
        """The examples of a step."""
        return [self.examples[i] for i in chosen(step, len(self.examples), self.batch, self.seed)]

    def gradients(self, step: int) -> dict[str, float]:
        """Add the gradients of a step's examples. The slots' vectors are made once; the loss of
        one slot of some rows after the other then goes back to them, and from there through the
        module, so that few logits are held at a time (5.3)."""
        with torch.autocast(self.places.device.type, torch.bfloat16, enabled=self.narrow):
            drafts = self.drafts(self.chosen(step))
            slots = self.module.slots(drafts.states, self.target.embed(drafts.tokens[:, 0]))
        known = drafts.labels >= 0
        counts = known.sum(0).tolist()
        weights = [self.slot_decay**slot for slot in range(len(counts))]
        whole = sum(map(operator.mul, weights, counts))
        losses, slopes = [0.0] * len(counts), []
        for rows in torch.split(torch.arange(len(known), device=known.device), ROWS):
            leaf = slots.detach()[rows].float().requires_grad_(True)
            taught = self.taught(drafts, rows)
            for slot, weight in enumerate(weights):
                used = known[rows, slot]
                some = rows[used]
                scores = self.scores(leaf[used, slot], drafts.tokens[some, slot])
                wanted = None if taught is None else taught[slot : slot + len(rows)][used]
                loss, slope = self.loss(scores.detach(), drafts.labels[some, slot], wanted)
                scores.backward(slope * (weight / whole))  # type: ignore[no-untyped-call]
                losses[slot] += loss
            assert leaf.grad is not None
            slopes.append(leaf.grad)
        slots.backward(torch.cat(slopes).to(slots.dtype))  # type: ignore[no-untyped-call]
        means = [loss / max(1, count) for loss, count in zip(losses, counts, strict=True)]
        told = {"loss": sum(means) / len(means), "first": means[0]}
        return told | {"tokens": float(len(drafts.states))}

    @torch.no_grad()
    def taught(self, drafts: Drafts, rows: Tensor) -> Tensor | None:
        """The target's distribution over the tokens guessed from, for the first slot of ``rows``
        and on to the last slot of the last of them, ``[n + slots - 1, draft_vocab]``; None where
        nothing is distilled."""
        if not self.distill:
            return None
        stop = int(rows[-1]) + drafts.labels.shape[1]
        return linear(drafts.coming[int(rows[0]) : stop], self.head).float().softmax(-1)

    @torch.no_grad()
    def loss(self, scores: Tensor, labels: Tensor, taught: Tensor | None) -> tuple[float, Tensor]:
        """Cross-entropy of the float32 ``scores`` ``[n, draft_vocab]`` against labels ``[n]``,
        mixed with what was ``taught``, summed over rows, and its slope by the scores. Written out,
        which takes fewer passes over them than autograd."""
        hard, at = 1 - self.distill, labels[:, None]
        total = scores.logsumexp(-1, keepdim=True)
        loss = total.sum() - hard * scores.gather(1, at).sum()
        slope = (scores - total).exp_()
        slope.scatter_add_(1, at, torch.full_like(total, -hard))
        if taught is not None:
            loss -= self.distill * torch.vdot(taught.flatten(), scores.flatten())
            slope.sub_(taught, alpha=self.distill)
        return float(loss), slope

    @property
    def narrow(self) -> bool:
        """Whether products are made in bfloat16, as the target's are."""
        return self.target.shape.dtype is torch.bfloat16

    def scores(self, states: Tensor, before: Tensor) -> Tensor:
        """Scores float32 ``[n, draft_vocab]`` of slots ``[n, hidden]`` behind tokens ``[n]``, with
        gradients."""
        normed = self.target.final_norm(states)
        scores = linear(normed.to(self.head.dtype), self.head).float()
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.narrow):
            narrowed = self.module.narrowed(self.target.embed(before).to(states.dtype))
            if narrowed is not None:
                scores = scores + self.module.followers(narrowed).float()
        return scores

    def drafts(self, examples: Sequence[Example]) -> Drafts:
        """The places of ``examples`` that drafts start from: every one from the last of the prompt
        on that has a token to guess."""
        seen = [self.taps(example) for example in examples]
        lengths = [len(one) for one in seen]
        places = torch.cat([torch.arange(n) for n in lengths]).to(seen[0].device)
        cosine, sine = (x.clone() for x in self.target.rotary(places))
        x = self.module(torch.cat(seen), cosine, sine, lengths)
        count = self.module.config.slots
        states, coming, tokens = [], [], []
        for example, context, taps in zip(examples, x.split(lengths), seen, strict=True):
            # The state at t, whose own token is the target's, forecasts t + 2 and on.
            first, stop = example.start - 1, len(example.tokens) - 2
            states.append(context[first:stop])
            coming.append(taps[first + 1 : stop + 1, -1])
            behind = torch.tensor([*example.tokens[first + 1 :], *[-1] * (count - 1)])
            tokens.append(behind.unfold(0, count + 1, 1))
        # The last slots reach past the end; their rows are read and not used.
        coming.append(coming[-1].new_zeros((count, coming[-1].shape[1])))
        known = torch.cat(tokens).to(x.device)
        labels = torch.where(known[:, 1:] >= 0, self.places[known[:, 1:].clamp(min=0)], -1)
        return Drafts(torch.cat(states), known.clamp(min=0), labels, torch.cat(coming))

    def read(self, most: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The first ``most`` examples as ``start_linear`` takes them."""
        for example in self.examples[:most]:
            taps = self.taps(example)
            yield taps, torch.tensor(example.tokens, device=taps.device), example.start

    @torch.no_grad()
    def taps(self, example: Example) -> Tensor:
        """The target's hidden states ``[tokens, taps, hidden]``."""
        kept = self._kept.get(id(example))
        if kept is not None:
            return kept
        target, count = self.target, len(example.tokens)
        batch = FlatBatch([(0, count)], [DensePolicy().build(target.shape)])
        ids = torch.tensor(example.tokens, device=self.places.device)
        places = torch.arange(count, device=ids.device)
        _, seen = target.hidden_and_taps(ids, places, batch, self.module.config.taps)
        # Copied, since what was made without gradients cannot be part of a graph.
        seen = seen.to(target.shape.dtype, copy=True)
        if self._room >= seen.nbytes:
            self._room -= seen.nbytes
            self._kept[id(example)] = seen
        return seen

    @torch.no_grad()
    def check(self, examples: Sequence[Example]) -> dict[str, float]:
        """Teacher-forced: tokens a step would commit, ``kappa``, drafting all slots at every
        place of ``examples``, and the share of places at which the first ``i`` slots are right."""
        right = []
        for first in range(0, len(examples), self.batch):
            with torch.autocast(self.places.device.type, torch.bfloat16, enabled=self.narrow):
                drafts = self.drafts(examples[first : first + self.batch])
                slots = self.module.slots(drafts.states, self.target.embed(drafts.tokens[:, 0]))
            best = []
            for slot in range(slots.shape[1]):
                parts = torch.split(torch.arange(len(slots), device=slots.device), ROWS)
                found = [self.scores(slots[r, slot].float(), drafts.tokens[r, slot]) for r in parts]
                best.append(torch.cat([scores.argmax(-1) for scores in found]))
            right.append((torch.stack(best, 1) == drafts.labels).cumprod(1).float())
        survive = torch.cat(right).mean(0).tolist()
        told = {f"right{i + 1}": share for i, share in enumerate(survive)}
        return {"kappa": 1 + sum(survive), **told}


@dataclass(frozen=True, slots=True)
class Drafts:
    """``n`` places drafts start from.

    ``states`` ``[n, hidden]`` are their context vectors, with gradients. ``tokens`` int64 ``[n,
    slots + 1]`` follow each: the target's own, then those to guess; 0 behind an end. ``labels``
    ``[n, slots]`` are the latter's places among the tokens guessed from, -1 for those that are not
    and behind an end. ``coming`` holds the target's last state behind which slot ``i`` of place
    ``p`` stands in row ``p + i``.
    """

    states: Tensor
    tokens: Tensor
    labels: Tensor
    coming: Tensor


def common_tokens(examples: Sequence[Example], count: int, vocabulary: int) -> Tensor:
    """The ``count`` tokens most often written in the answers, in rising order, int32; the lowest
    ids of ``vocabulary`` fill it up, since tokenizers number common tokens first."""
    seen = Counter(t for e in examples for t in e.tokens[e.start :])
    ranked = dict.fromkeys([*(t for t, _ in seen.most_common()), *range(vocabulary)])
    return torch.tensor(sorted(list(ranked)[:count]), dtype=torch.int32)

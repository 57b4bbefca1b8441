"""Trains a CLSR recogniser: to write, and so that questions find what it wrote (sheet 3.3 to 5).

First on speech recognition alone, then with the contrastive loss added. The speech encoder and the
text encoder stay as they are. Left out of the paper's losses: the expected word error of sampled
transcripts, of which its public predecessors hold no code either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from narrows.config import Settings
from narrows.errors import InputError
from narrows.figure import new_figure, save_figure
from narrows.retrieve.clsr import (
    ClsrConfig,
    Pieces,
    Recogniser,
    embedded,
    in_words,
    padded,
)
from narrows.retrieve.rank import Embedder
from narrows.train.loop import LoopOptions, chosen, processes, train
from narrows.train.speech import Clip
from narrows.train.textlike import Adaptor, Reading, read_as_text, text_like

Positions = Literal["any", "errors"]


class Goal(Settings):
    """The loss and its parts.

    ``quantity`` and ``contrast`` are the weights of how many tokens fire and of finding, the rest
    is that of recognition, the paper's thirds. ``smoothing`` is of labels. ``sampling`` times the
    wrong tokens of a first pass are replaced by the right ones before the second, at ``positions``:
    "any" as the paper's algorithm and its predecessors have it, "errors" as its text does.
    ``gamma``, ``reading`` and ``adaptor`` see ``text_like``. ``temperature`` divides cosines; the
    paper does not print its own. ``negatives`` "all" is an extension: clips are told from every
    question of the training set, not only those of the batch.
    """

    quantity: Annotated[float, Field(ge=0.0, le=1.0)] = 1 / 3
    contrast: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    sampling: Annotated[float, Field(ge=0.0, le=1.0)] = 0.75
    positions: Positions = "any"
    gamma: Annotated[float, Field(gt=0.0)] = 0.1
    reading: Reading = "logits"
    adaptor: Adaptor = "quantised"
    temperature: Annotated[float, Field(gt=0.0)] = 0.02
    negatives: Literal["batch", "all"] = "batch"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantity + self.contrast > 1 + 1e-9:
            raise ValueError("quantity and contrast must not exceed 1 together")
        return self


class Speech(Protocol):
    """Clips with their states, see ``narrows.train.speech.SpeechSet``."""

    clips: list[Clip]

    def states(self, index: int) -> Tensor:
        """``[T, state_size]``."""


def run(
    text: Embedder,
    speech: Speech,
    held: Speech,
    out: Path,
    stages: Sequence[tuple[str, Goal, LoopOptions]],
    *,
    batch: int = 32,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, told: None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Train a recogniser for ``text`` on ``speech`` in stages, write it to ``out`` and return the
    history, each row with the ``stage`` it belongs to. What is half done in ``out`` is gone on
    from.

    Args:
        text: the text encoder; it stays as it is.
        speech: what is learnt from; a stage with a contrastive part takes the clips of it that
            have a question.
        held: what is measured on at every checkpoint.
        stages: one after the other, each with a name, which is that of its folder in ``out``'s
            ``work``.
        batch: clips of an update.
        changes: of the recogniser's config.

    Raises as ``train`` does, and InputError where there is nothing to learn from or to measure on.
    """
    pieces = Pieces.of(text)
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(pieces.table), "width": pieces.table.shape[1]}
    config = ClsrConfig(vocabulary=pieces.digest, **{**sizes, **changes})
    module = Recogniser(config, pieces).to(pieces.table.device)
    if not held.clips:
        raise InputError("there are no held-out clips to measure on; give more")
    check = HeldOut(module, text, held)
    history: list[dict[str, Any]] = []
    before = config.model_dump_json()
    for name, goal, options in stages:
        objective = ClsrObjective(module, text, speech, goal, batch=batch, seed=seed)
        before = f"{before} {objective.digest} {goal.model_dump_json()} {batch} {seed}"
        rows = train(
            module,
            objective.gradients,
            out / "work" / name,
            options,
            data=hashlib.sha256(before.encode()).hexdigest()[:16],
            check=check.measure,
            on_step=on_step,
        )
        history += [{**row, "stage": name} for row in rows]
    if processes(pieces.table.device).is_main_process:
        module.eval().save(out)
    return history


class ClsrObjective:
    """The joint loss of sheet section 4, over ``batch`` clips a step.

    Args:
        module: trained in place; float32.
        text: frozen.
        speech: see ``run``.
        goal: what is weighed how.
        seed: of the order of clips, of dropout and of sampled positions; what a step does depends
            on its number only.
    """

    def __init__(
        self,
        module: Recogniser,
        text: Embedder,
        speech: Speech,
        goal: Goal,
        *,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        self.module, self.text, self.speech, self.goal = module, text, speech, goal
        self.batch, self.seed = batch, seed
        unknown = text.tokenizer.unk_token_id
        self.targets = [torch.tensor(piece_ids(clip.words, text)) for clip in speech.clips]
        self.usable = [
            i
            for i, (ids, clip) in enumerate(zip(self.targets, speech.clips, strict=True))
            if len(ids) and unknown not in ids and (clip.question or not goal.contrast)
        ]
        if not self.usable:
            raise InputError("no clip can be learnt from: none has the words or question it needs")
        self.places: dict[str, int] = {}
        if goal.contrast:
            asked = dict.fromkeys(speech.clips[i].question for i in self.usable)
            self.places = {question: place for place, question in enumerate(asked)}
            self.questions = torch.from_numpy(text.embed(list(asked))).to(module.table.device)

    @property
    def digest(self) -> str:
        """Tells what is learnt from apart."""
        told = "\0".join(self.speech.clips[i].words for i in self.usable)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def chosen(self, step: int) -> list[int]:
        """The clips of a step."""
        return [self.usable[i] for i in chosen(step, len(self.usable), self.batch, self.seed)]

    def gradients(self, step: int) -> dict[str, float]:
        """Add the gradients of a step's clips; the parts of the loss, unweighted, and the share of
        pieces that the first pass got wrong."""
        torch.manual_seed(self.seed * 1_000_003 + step)
        self.module.train()
        loss, told = self.loss(self.chosen(step))
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach()), **told}

    def loss(self, picked: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss of clips, with gradients, and its parts."""
        module, goal = self.module, self.goal
        device = module.table.device
        states, mask = padded([self.speech.states(i) for i in picked], device)
        own = [self.targets[i] for i in picked]
        counts = torch.tensor([len(ids) for ids in own], device=device)
        wanted = torch.cat(own).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            frames, real = module.frames(states, mask)
            embeds, fired = module.fired(frames, real, counts)
            memory = module.remember(frames, real)
            with torch.no_grad():
                guessed = module.scores(module.decode(embeds, counts, memory)).argmax(1)
            wrong = guessed != wanted
            embeds = sampled(embeds, counts, wrong, module.table[wanted], goal)
            scores = module.scores(module.decode(embeds, counts, memory))
        recognition = cross_entropy(scores, wanted, label_smoothing=goal.smoothing)
        quantity = (fired.totals - counts).abs().sum() / counts.sum()
        told = {"recognition": recognition, "quantity": quantity, "wrong": wrong.float().mean()}
        loss = (1 - goal.quantity - goal.contrast) * recognition + goal.quantity * quantity
        if goal.contrast:
            told["contrast"] = self.contrast(scores, counts, picked)
            loss = loss + goal.contrast * told["contrast"]
        return loss, {name: float(part.detach()) for name, part in told.items()}

    def contrast(self, scores: Tensor, counts: Tensor, picked: Sequence[int]) -> Tensor:
        """The contrastive loss of clips recognised with ``scores`` ``[R, vocab]``."""
        module, goal = self.module, self.goal
        embeds = text_like(
            scores,
            module.table,
            module.special,
            gamma=goal.gamma,
            reading=goal.reading,
            adaptor=goal.adaptor,
        )
        with torch.autocast(scores.device.type, torch.bfloat16):
            clips = read_as_text(embeds, counts.tolist(), self.text)
        asked = torch.tensor([self.places[self.speech.clips[i].question] for i in picked])
        asked = asked.to(scores.device)
        others = None
        if goal.negatives == "all":
            absent = torch.ones(len(self.questions), dtype=torch.bool, device=scores.device)
            absent[asked] = False
            others = self.questions[absent]
        return info_nce(clips, self.questions[asked], asked, goal.temperature, others)


def sampled(
    embeds: Tensor, counts: Tensor, wrong: Tensor, references: Tensor, goal: Goal
) -> Tensor:
    """``embeds`` ``[B, N, width]`` with some tokens' embeddings replaced (3.3).

    Args:
        counts: int64 ``[B]``, tokens of each item.
        wrong: bool ``[R]``, which of all items' tokens, end to end, were guessed wrong. Of an item
            with ``e`` such, ``floor(goal.sampling * e)`` are replaced, at random.
        references: ``[R, width]``, what is put there.
    """
    real = torch.arange(embeds.shape[1], device=embeds.device) < counts[:, None]
    missed = torch.zeros_like(real).masked_scatter(real, wrong)
    open_to = real if goal.positions == "any" else missed
    drawn = torch.rand(real.shape, device=embeds.device).masked_fill(~open_to, 2.0)
    ranks = drawn.argsort(1).argsort(1)
    take = ranks < (goal.sampling * missed.sum(1) + 1e-6).floor()[:, None]
    given = torch.zeros_like(embeds).masked_scatter(real[:, :, None], references.to(embeds.dtype))
    return torch.where(take[:, :, None], given, embeds)


def info_nce(
    clips: Tensor,
    questions: Tensor,
    groups: Tensor,
    temperature: float,
    others: Tensor | None = None,
) -> Tensor:
    """Mean of both directions' cross-entropy of telling pairs of unit vectors ``[B, width]`` from
    each other.

    Pairs of one group, int64 ``[B]``, are alike: none is a wrong answer to another, and together
    they weigh as much as one pair, as right answers and as wrong ones. ``others`` ``[M, width]``
    are more questions, to none of these clips.
    """
    same = groups[:, None] == groups
    copies = same.sum(1).float()
    itself = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    cosines = clips @ questions.T / temperature
    to_questions, to_clips = (
        torch.where(itself, scores, (scores - copies.log()).masked_fill(same, -math.inf))
        for scores in (cosines, cosines.T)
    )
    if others is not None:
        to_questions = torch.cat([to_questions, clips @ others.T / temperature], 1)
    right = torch.arange(len(groups), device=groups.device)
    losses = sum(cross_entropy(s, right, reduction="none") for s in (to_questions, to_clips))
    return (losses / copies).sum() / (1 / copies).sum() / 2


class HeldOut:
    """Measures a recogniser on clips it has not learnt from, as it is used: with as many tokens as
    its own weights fire."""

    def __init__(self, module: Recogniser, text: Embedder, held: Speech) -> None:
        self.module, self.text, self.held = module, text, held
        self.asked = sorted({clip.question for clip in held.clips if clip.question})
        self.questions = text.embed(self.asked)
        self.pieces = [piece_ids(clip.words, text) for clip in held.clips]
        self.words = [in_words(ids, text).split() for ids in self.pieces]

    def measure(self) -> dict[str, float]:
        """Errors a word piece and a word, tokens fired a token said, and, if clips are held that
        have a question, ``found``: the share of questions to which the nearest of all clips is
        theirs, or one of theirs."""
        self.module.eval()
        count = len(self.held.clips)
        heard = [h.ids for h in self.module.recognise([self.held.states(i) for i in range(count)])]
        words = [in_words(ids, self.text).split() for ids in heard]
        told = {
            "piece_error": error_rate(heard, self.pieces),
            "word_error": error_rate(words, self.words),
            "fired": sum(map(len, heard)) / sum(map(len, self.pieces)),
        }
        if self.asked:
            cosines = self.questions @ embedded(heard, self.text).T
            nearest = [self.held.clips[i].question for i in cosines.argmax(1)]
            right = sum(a == b for a, b in zip(nearest, self.asked, strict=True))
            told["found"] = right / len(self.asked)
        return told


def piece_ids(words: str, text: Embedder) -> list[int]:
    """The word pieces that a clip of ``words`` is to be read as."""
    return text.tokenizer.encode(words, add_special_tokens=False)  # type: ignore[no-any-return]


def error_rate(found: Sequence[Sequence[Any]], right: Sequence[Sequence[Any]]) -> float:
    """Insertions, deletions and replacements that make each of ``right`` of each of ``found``, by
    the length of all of ``right``."""
    return sum(map(edits, found, right)) / max(1, sum(map(len, right)))


def edits(found: Sequence[Any], right: Sequence[Any]) -> int:
    """Insertions, deletions and replacements between two sequences (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, one in enumerate(found, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (one != other))
    return row[-1]


def draw(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The parts of the loss over the updates of all stages, and what was measured on held-out
    clips. Raises as ``new_figure`` and ``save_figure``."""
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    numbered = list(enumerate(history))
    for part in ("recognition", "quantity", "contrast", "wrong"):
        points = [(n, row[part]) for n, row in numbered if part in row]
        if points:
            left.plot(*zip(*points, strict=True), label=part, lw=0.8)
    left.set(xlabel="update", ylabel="training: parts of the loss", yscale="log")
    left.legend()
    for part in ("piece_error", "word_error", "fired", "found"):
        points = [(n, row[part]) for n, row in numbered if part in row]
        if points:
            right.plot(*zip(*points, strict=True), "-o", ms=3, label=part.replace("_", " "))
    right.set(xlabel="update", ylabel="held-out articles and voices", ylim=(0, None))
    right.legend()
    save_figure(figure, path)

"""Training what hears: clips of speech in steps, and clips told apart by the texts they go with.

Shared by the trainings of heads on a speech encoder (``narrows.retrieve.speech_head``).
"""

from __future__ import annotations

import hashlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from narrows.errors import InputError
from narrows.figure import new_figure, save_figure
from narrows.retrieve.rank import Embedder
from narrows.train.loop import chosen
from narrows.train.speech import Clip

Negatives = Literal["batch", "all"]
POOL = 16
"""Updates whose clips are drawn together, at most; fewer than an epoch's."""


class Speech(Protocol):
    """Clips with their states, see ``narrows.train.speech.SpeechSet``."""

    clips: list[Clip]

    def states(self, index: int) -> Tensor:
        """``[T, state_size]``."""

    def length(self, index: int) -> int:
        """``T``."""


class Objective(ABC):
    """A loss over ``batch`` clips a step.

    Args:
        module: trained in place; float32.
        speech: what is learnt from.
        usable: the numbers of its clips that can be learnt from.
        seed: of the order of clips and of what is drawn within a step; what a step does depends on
            its number only.

    Raises InputError if no clip is usable.
    """

    def __init__(
        self, module: nn.Module, speech: Speech, usable: Sequence[int], *, batch: int, seed: int
    ) -> None:
        if not usable:
            raise InputError("no clip can be learnt from: none has the words or question it needs")
        self.module, self.speech, self.usable = module, speech, usable
        self.batch, self.seed = batch, seed

    @abstractmethod
    def loss(self, picked: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss of clips, with gradients, and what is told of it."""

    @property
    def digest(self) -> str:
        """Tells what is learnt from apart."""
        told = "\0".join(self.speech.clips[i].words for i in self.usable)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def chosen(self, step: int) -> list[int]:
        """The clips of a step, of like length, so that little of a batch is padding: clips are
        drawn for up to POOL steps together, sorted, cut into batches, and these taken in random
        order."""
        steps = max(1, min(POOL, len(self.usable) // self.batch))
        pool, place = divmod(step, steps)
        drawn = chosen(pool, len(self.usable), self.batch * steps, self.seed)
        ordered = sorted((self.usable[i] for i in drawn), key=self.speech.length)
        turns = random.Random(self.seed * 1_000_003 + pool).sample(range(steps), steps)
        return ordered[turns[place] * self.batch :][: self.batch]

    def gradients(self, step: int) -> dict[str, float]:
        """Add the gradients of a step's clips; the loss and what is told of it."""
        torch.manual_seed(self.seed * 1_000_003 + step)
        self.module.train()
        loss, told = self.loss(self.chosen(step))
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach()), **told}


class Counterparts:
    """Texts that clips are to be found by, and told from.

    Args:
        vectors: unit ones, ``[M, width]``, constants.
        groups: int64 ``[M]``; texts of one group go with the same clips.
        temperature: divides cosines.
        negatives: "batch" tells clips from the texts that go with the batch's clips, "all" from all
            the others too.
    """

    def __init__(
        self, vectors: Tensor, groups: Tensor, temperature: float, negatives: Negatives
    ) -> None:
        self.vectors, self.groups = vectors, groups
        self.temperature, self.negatives = temperature, negatives

    def contrast(self, clips: Tensor, places: Sequence[int]) -> Tensor:
        """``info_nce`` of unit vectors of clips ``[B, width]``, each with the text at its place. A
        clip may stand there once for every text of its own."""
        own = torch.tensor(places, device=self.vectors.device)
        groups = self.groups[own]
        others = None
        if self.negatives == "all":
            others = self.vectors[~torch.isin(self.groups, groups)]
        return info_nce(clips, self.vectors[own], groups, self.temperature, others)


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


class Questions:
    """The questions that clips answer, each once: their ``texts``, and unit ``vectors`` float32
    ``[n, width]``."""

    def __init__(self, clips: Sequence[Clip], text: Embedder) -> None:
        self.clips = clips
        self.texts = sorted({clip.question for clip in clips if clip.question})
        self.vectors = text.embed(self.texts)

    def found(self, clips: NDArray[np.float32]) -> float:
        """The share of questions to which the nearest of all clips, by vectors ``[m, width]``, is
        theirs, or one of theirs."""
        nearest = [self.clips[i].question for i in (self.vectors @ clips.T).argmax(1)]
        return float(np.mean([a == b for a, b in zip(nearest, self.texts, strict=True)]))


def draw(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The parts of the loss over the updates of all stages, and what was measured on held-out
    clips. Raises as ``new_figure`` and ``save_figure``."""
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    numbered = list(enumerate(history))
    for part in ("letters", "recognition", "quantity", "contrast", "wrong"):
        points = [(n, row[part]) for n, row in numbered if part in row]
        if points:
            left.plot(*zip(*points, strict=True), label=part, lw=0.8)
    left.set(xlabel="update", ylabel="training: parts of the loss", yscale="log")
    left.legend()
    for part in ("piece_error", "word_error", "fired", "found", "found_soft"):
        points = [(n, row[part]) for n, row in numbered if part in row]
        if points:
            right.plot(*zip(*points, strict=True), "-o", ms=3, label=part.replace("_", " "))
    right.set(xlabel="update", ylabel="held-out articles and voices", ylim=(0, None))
    right.legend()
    save_figure(figure, path)

"""Trains a dual encoder: clips and the texts they go with, brought together by their vectors.

The texts are the question that a clip answers, where it has one, and its own words, as CLAP pairs
sounds with captions: most speech has no question, and questions alone are few to learn a language
from. The speech encoder and the text encoder stay as they are, as in ``narrows.train.clsr``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from narrows.config import Settings
from narrows.errors import InputError
from narrows.retrieve.clsr import Pieces
from narrows.retrieve.dual import DualConfig, DualEncoder
from narrows.retrieve.rank import Embedder
from narrows.retrieve.speech_head import padded
from narrows.train.hearing import Counterparts, Negatives, Objective, Questions, Speech
from narrows.train.loop import LoopOptions, processes, train
from narrows.train.spoken_text import words_of


class DualGoal(Settings):
    """What is learnt: with ``captions`` the words of all clips beside the questions of some,
    without them the questions alone. ``temperature`` and ``negatives`` see ``Counterparts``."""

    captions: bool = True
    temperature: Annotated[float, Field(gt=0.0)] = 0.05
    negatives: Negatives = "all"


def run(
    text: Embedder,
    speech: Speech,
    held: Speech,
    out: Path,
    goal: DualGoal,
    options: LoopOptions,
    *,
    batch: int = 32,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, told: None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Train a dual encoder for ``text`` on ``speech``, write it to ``out`` and return the history.
    What is half done in ``out``'s ``work`` is gone on from.

    Args:
        text: the text encoder; it stays as it is.
        speech: what is learnt from.
        held: what is measured on at every checkpoint: the share of questions ``found``.
        batch: clips of an update.
        changes: of the dual encoder's config.

    Raises as ``train`` does, and InputError where there is nothing to learn from or to measure on.
    """
    pieces = Pieces.of(text)
    torch.manual_seed(seed)
    config = DualConfig(vocabulary=pieces.digest, text_width=pieces.table.shape[1], **changes)
    module = DualEncoder(config, pieces).to(pieces.table.device)
    questions = Questions(held.clips, text)
    if not questions.texts:
        raise InputError("there are no held-out clips with a question to measure on; give more")

    def check() -> dict[str, float]:
        states = [held.states(i) for i in range(len(held.clips))]
        return {"found": questions.found(module.eval().encode(states))}

    objective = DualObjective(module, text, speech, goal, batch=batch, seed=seed)
    told = f"{config.model_dump_json()} {objective.digest} {goal.model_dump_json()} {batch} {seed}"
    history = train(
        module,
        objective.gradients,
        out / "work" / "pairs",
        options,
        data=hashlib.sha256(told.encode()).hexdigest()[:16],
        check=check,
        on_step=on_step,
    )
    if processes(pieces.table.device).is_main_process:
        module.eval().save(out)
    return history


class DualObjective(Objective):
    """Clips told apart by their texts, and texts by their clips.

    A clip stands in a batch once for each of its texts. Clips that share a text, and all texts of
    those clips, are one group of ``info_nce``: none of them is a wrong answer to another. Texts of
    the same words count as one, since what is said in a clip may be the question of the next.

    Args:
        text: frozen.
        goal: what is learnt.
        module, speech, batch, seed: see ``Objective``.
    """

    module: DualEncoder

    def __init__(
        self,
        module: DualEncoder,
        text: Embedder,
        speech: Speech,
        goal: DualGoal,
        *,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        self.told = [
            [t for t in (clip.question, clip.words if goal.captions else "") if t]
            for clip in speech.clips
        ]
        usable = [i for i, texts in enumerate(self.told) if texts]
        super().__init__(module, speech, usable, batch=batch, seed=seed)
        texts = dict.fromkeys(one for told in self.told for one in told)
        groups = grouped([[words_of(one) for one in told] for told in self.told])
        self.places = {one: place for place, one in enumerate(texts)}
        device = module.project.weight.device
        self.texts = Counterparts(
            torch.from_numpy(text.embed(list(texts))).to(device),
            torch.tensor([groups[words_of(one)] for one in texts], device=device),
            goal.temperature,
            goal.negatives,
        )

    def loss(self, picked: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss of clips, with gradients, all of which is its part ``contrast``."""
        device = self.module.project.weight.device
        states, mask = padded([self.speech.states(i) for i in picked], device)
        with torch.autocast(device.type, torch.bfloat16):
            vectors = self.module(states, mask)
        rows = [row for row, i in enumerate(picked) for _ in self.told[i]]
        places = [self.places[one] for i in picked for one in self.told[i]]
        loss = self.texts.contrast(vectors[rows], places)
        return loss, {"contrast": float(loss.detach())}


def grouped(told: Sequence[Sequence[str]]) -> dict[str, int]:
    """Every text of all clips, once, with the number of its group: two texts of one clip are in one
    group, and so on from clip to clip."""
    groups: dict[str, int] = {}
    members: dict[int, list[str]] = {}
    for number, texts in enumerate(told):
        members[number] = list(texts)
        for known in {groups[one] for one in texts if one in groups}:
            members[number] += members.pop(known)
        groups |= dict.fromkeys(members[number], number)
    return groups

"""Trains a CLSR recogniser: to write, and so that questions find what it wrote (sheet 3.3 to 5).

First on speech recognition alone, then with the contrastive loss added. The speech encoder and the
text encoder stay as they are. Left out of the paper's losses: the expected word error of sampled
transcripts, of which its public predecessors hold no code either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from narrows.config import Settings
from narrows.errors import InputError
from narrows.retrieve.cif import Fired
from narrows.retrieve.clsr import (
    ClsrConfig,
    Pieces,
    Recogniser,
    embedded,
    in_words,
)
from narrows.retrieve.rank import Embedder
from narrows.retrieve.speech_head import STRIDE, by_length, padded
from narrows.train.hearing import Counterparts, Negatives, Objective, Questions, Speech
from narrows.train.letters import LettersObjective
from narrows.train.loop import LoopOptions, processes, train
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
    negatives: Negatives = "batch"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantity + self.contrast > 1 + 1e-9:
            raise ValueError("quantity and contrast must not exceed 1 together")
        return self


def run(
    text: Embedder,
    speech: Speech,
    held: Speech,
    out: Path,
    stages: Sequence[tuple[str, Goal, LoopOptions]],
    *,
    letters: LoopOptions | None = None,
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
        letters: of a stage before them, in which the convolutions over states learn letters, and
            so where every token ends, see ``narrows.train.letters``; None for none.
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

    def learn(name: str, objective: Objective, told: str, options: LoopOptions) -> None:
        nonlocal before
        before = f"{before} {objective.digest} {told} {batch} {seed}"
        rows = train(
            objective.module,
            objective.gradients,
            out / "work" / name,
            options,
            data=hashlib.sha256(before.encode()).hexdigest()[:16],
            check=check.measure if objective.module is module else None,
            on_step=on_step,
        )
        history.extend({**row, "stage": name} for row in rows)

    ends = None
    if letters is not None:
        lesson = LettersObjective(module, speech, batch=batch, seed=seed)
        learn("letters", lesson, "", letters)
        names = [
            text.tokenizer.convert_ids_to_tokens(piece_ids(c.words, text)) for c in speech.clips
        ]
        with processes(pieces.table.device).main_process_first():
            ends = lesson.kept_ends(names, out / "work" / "ends.safetensors", before)
    for name, goal, options in stages:
        objective = ClsrObjective(module, text, speech, goal, ends=ends, batch=batch, seed=seed)
        learn(name, objective, goal.model_dump_json(), options)
    if processes(pieces.table.device).is_main_process:
        module.eval().save(out)
    return history


class ClsrObjective(Objective):
    """The joint loss of sheet section 4.

    Args:
        text: frozen.
        goal: what is weighed how.
        ends: of each clip, the state at which each of its tokens ends, int64 ``[n]``, where that
            is known. Quantity is then counted token by token: an extension.
        module, speech, batch, seed: see ``Objective``.
    """

    module: Recogniser

    def __init__(
        self,
        module: Recogniser,
        text: Embedder,
        speech: Speech,
        goal: Goal,
        *,
        ends: Sequence[Tensor] | None = None,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        self.text, self.goal, self.ends = text, goal, ends
        unknown = text.tokenizer.unk_token_id
        self.targets = [torch.tensor(piece_ids(clip.words, text)) for clip in speech.clips]
        usable = [
            i
            for i, (ids, clip) in enumerate(zip(self.targets, speech.clips, strict=True))
            if len(ids) and unknown not in ids and (clip.question or not goal.contrast)
        ]
        super().__init__(module, speech, usable, batch=batch, seed=seed)
        if goal.contrast:
            asked = dict.fromkeys(speech.clips[i].question for i in usable)
            self.places = {question: place for place, question in enumerate(asked)}
            vectors = torch.from_numpy(text.embed(list(asked))).to(module.table.device)
            apart = torch.arange(len(asked), device=vectors.device)
            self.questions = Counterparts(vectors, apart, goal.temperature, goal.negatives)

    def loss(self, picked: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss of clips, with gradients, its parts, unweighted, and the share of pieces that
        the first pass got ``wrong``."""
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
        if self.ends is None:
            quantity = (fired.totals - counts).abs().sum() / counts.sum()
        else:
            quantity = uneven(fired, counts, [self.ends[i] for i in picked])
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
        return self.questions.contrast(
            clips, [self.places[self.speech.clips[i].question] for i in picked]
        )


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


def uneven(fired: Fired, counts: Tensor, ends: Sequence[Tensor]) -> Tensor:
    """How far the weights within each token are from one, a token; within the clip, from the number
    of tokens, where it is not known when they end. See ``ClsrObjective`` for the arguments."""
    sums = torch.nn.functional.pad(fired.weights.cumsum(1), (1, 0))
    missing = torch.zeros((), device=sums.device)
    for own, count, stops in zip(sums, counts, ends, strict=True):
        if len(stops):
            frames = (stops.to(own.device) + STRIDE // 2) // STRIDE
            inside = own[frames.clamp(max=len(own) - 1)].diff(prepend=own[:1])
            missing = missing + (inside - 1).abs().sum()
        else:
            missing = missing + (own[-1] - count).abs()
    return missing / counts.sum()


class HeldOut:
    """Measures a recogniser on clips it has not learnt from, as it is used: with as many tokens as
    its own weights fire."""

    def __init__(self, module: Recogniser, text: Embedder, held: Speech) -> None:
        self.module, self.text, self.held = module, text, held
        self.questions = Questions(held.clips, text)
        self.pieces = [piece_ids(clip.words, text) for clip in held.clips]
        self.words = [in_words(ids, text).split() for ids in self.pieces]

    def measure(self) -> dict[str, float]:
        """Errors a word piece and a word, tokens fired a token said, and, if clips are held that
        have a question, the share of questions ``found``, see ``Questions``, by the pieces that are
        written, and ``found_soft``, by mixtures of all pieces."""
        self.module.eval()
        states = [self.held.states(i) for i in range(len(self.held.clips))]
        heard = [h.ids for h in self.module.recognise(states)]
        words = [in_words(ids, self.text).split() for ids in heard]
        told = {
            "piece_error": error_rate(heard, self.pieces),
            "word_error": error_rate(words, self.words),
            "fired": sum(map(len, heard)) / sum(map(len, self.pieces)),
        }
        if self.questions.texts:
            told["found"] = self.questions.found(embedded(heard, self.text))
            told["found_soft"] = self.questions.found(self._mixed(states))
        return told

    @torch.inference_mode()
    def _mixed(self, states: Sequence[Tensor]) -> NDArray[np.float32]:
        """Unit vectors ``[len(states), width]`` of clips read without a choice of pieces, as the
        adaptor "soft" has them; 0 where nothing was said."""
        module = self.module
        vectors = np.zeros((len(states), module.config.width), np.float32)
        for chosen in by_length([*map(len, states)]):
            batch, mask = padded([states[i] for i in chosen], module.table.device)
            draft, _ = module.draft(batch, mask)
            said = draft.counts > 0
            if said.any():
                scores = module.scores(draft.vectors[draft.places])
                embeds = text_like(scores, module.table, module.special, adaptor="soft")
                read = read_as_text(embeds, draft.counts[said].tolist(), self.text)
                vectors[np.array(chosen)[said.numpy(force=True)]] = read.numpy(force=True)
        return vectors


def piece_ids(words: str, text: Embedder) -> list[int]:
    """The word pieces that a clip of ``words`` is to be read as."""
    return text.pieces(words)


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

"""What is said, letter by letter: a short lesson before a recogniser learns to write.

An extension of ours. Whole words are learnt slowly, since each is rare and where it is said has to
be found too. Letters are few, often said, and learnt frame by frame without knowing where
(connectionist temporal classification): convolutions over states that have learnt them tell what
comes after how a word sounds, and the likeliest path of a clip's letters where each of its word
pieces ends. The layer that names letters is thrown away.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss

from narrows.errors import ConfigError
from narrows.retrieve.clsr import Recogniser
from narrows.retrieve.speech_head import by_length, padded
from narrows.train.hearing import Objective, Speech
from narrows.train.kept import kept

ALPHABET = f" '{string.ascii_lowercase}"
BLANK = len(ALPHABET)


class LettersObjective(Objective):
    """The loss of letters of a recogniser's convolutions over states. What learns is they and a
    layer behind them.

    Args:
        recogniser: its convolutions are trained in place.
        speech, batch, seed: see ``Objective``.

    Raises ConfigError for a recogniser without them.
    """

    def __init__(
        self, recogniser: Recogniser, speech: Speech, *, batch: int = 32, seed: int = 0
    ) -> None:
        if not recogniser.near:
            raise ConfigError("letters are learnt by convolutions over states; give one or more")
        score = nn.Linear(recogniser.config.width, len(ALPHABET) + 1)
        learns = nn.ModuleList([recogniser.near, score.to(recogniser.table.device)])
        usable = [i for i, clip in enumerate(speech.clips) if clip.words]
        super().__init__(learns, speech, usable, batch=batch, seed=seed)
        self.recogniser, self.score = recogniser, score

    def loss(self, picked: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss a letter, which is its part ``letters``."""
        device = self.recogniser.table.device
        states, mask = padded([self.speech.states(i) for i in picked], device)
        with torch.autocast(device.type, torch.bfloat16):
            scores = self.score(self.recogniser.refined(states, mask))
        loss = letter_loss(scores, mask, [self.speech.clips[i].words for i in picked])
        return loss, {"letters": float(loss.detach())}

    @torch.inference_mode()
    def ends(self, pieces: Sequence[Sequence[str]]) -> list[Tensor]:
        """Of every clip, the state at which each of its ``pieces``, those of its words, ends, int64
        ``[len(pieces)]``: halfway to where the next begins, the last where the clip does. Empty
        for clips that have no part in the loss."""
        found = [torch.zeros(0, dtype=torch.long) for _ in pieces]
        device = self.recogniser.table.device
        for some in by_length([self.speech.length(i) for i in self.usable]):
            picked = [self.usable[place] for place in some]
            states, mask = padded([self.speech.states(i) for i in picked], device)
            with torch.autocast(device.type, torch.bfloat16):
                scores = self.score(self.recogniser.refined(states, mask)).float()
            spans = letter_spans(scores, mask, [self.speech.clips[i].words for i in picked])
            for i, own in zip(picked, spans, strict=True):
                if own:
                    length = self.speech.length(i)
                    found[i] = piece_ends(own, self.speech.clips[i].words, pieces[i], length)
        return found

    def kept_ends(self, pieces: Sequence[Sequence[str]], path: Path, origin: str) -> list[Tensor]:
        """``ends``, or what of them is kept at ``path``, see ``narrows.train.kept``."""

        def make() -> dict[str, Tensor]:
            ends = self.ends(pieces)
            return {"ends": torch.cat(ends), "counts": torch.tensor([len(own) for own in ends])}

        found = kept(path, hashlib.sha256(origin.encode()).hexdigest()[:16], make)
        return [*torch.split(found["ends"], found["counts"].tolist())]


def letter_loss(scores: Tensor, mask: Tensor, words: Sequence[str]) -> Tensor:
    """Loss a letter of the ``words`` of clips, as ``spoken_text.words_of`` gives them.

    Args:
        scores: ``[B, T, len(ALPHABET) + 1]``, before any softmax, BLANK last.
        mask: bool ``[B, T]``, which are not padding.

    A clip with more letters than states has no part in it.
    """
    targets = [[ALPHABET.index(letter) for letter in one] for one in words]
    lengths = torch.tensor([len(one) for one in targets])
    total = ctc_loss(
        scores.float().log_softmax(2).transpose(0, 1),
        torch.tensor([place for one in targets for place in one], device=scores.device),
        mask.sum(1).cpu(),
        lengths,
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )
    return total / lengths.sum()


def letter_spans(scores: Tensor, mask: Tensor, words: Sequence[str]) -> list[list[tuple[int, int]]]:
    """First and last state of every letter in the likeliest way to write the ``words`` of each clip
    (Viterbi). Arguments as ``letter_loss``; nothing for a clip with more letters than states."""
    logs = scores.log_softmax(2).cpu().numpy()
    lengths = mask.sum(1).tolist()
    places = [[ALPHABET.index(letter) for letter in one] for one in words]
    count, width = len(words), 2 * max(map(len, places)) + 1
    labels = np.full((count, width), BLANK)
    for row, own in enumerate(places):
        labels[row, 1 : 2 * len(own) : 2] = own
    # A letter may follow another at once, without a blank between, if they differ.
    leaps = np.zeros((count, width), bool)
    leaps[:, 3::2] = labels[:, 3::2] != labels[:, 1:-2:2]
    best = np.full((count, width), -np.inf, np.float32)
    best[:, 0] = 0.0
    came = np.zeros((max(lengths), count, width), np.int8)
    for t in range(max(lengths)):
        ways = np.full((3, count, width), -np.inf, np.float32)
        ways[0] = best
        ways[1, :, 1:] = best[:, :-1]
        if t:
            ways[2, :, 2:] = np.where(leaps[:, 2:], best[:, :-2], -np.inf)
        came[t] = ways.argmax(0)
        emitted = np.take_along_axis(logs[:, t], labels, 1)
        told = ways.max(0) + emitted
        running = np.array(lengths)[:, None] > t
        best = np.where(running, told, best)
        came[t][~running[:, 0]] = 0
    return [
        _spans(best[row], came[: lengths[row], row], len(own)) for row, own in enumerate(places)
    ]


def _spans(best: Any, came: Any, letters: int) -> list[tuple[int, int]]:
    """The way back of one clip: ``best`` ``[2 * letters + 1, ...]`` and how each state ``came``."""
    at = 2 * letters if best[2 * letters] >= best[2 * letters - 1] else 2 * letters - 1
    if not np.isfinite(best[at]):
        return []
    states: list[list[int]] = [[] for _ in range(letters)]
    for t in range(len(came) - 1, -1, -1):
        if at % 2:
            states[at // 2].append(t)
        at -= int(came[t, at])
    return [(own[-1], own[0]) for own in states]


def piece_ends(
    spans: Sequence[tuple[int, int]], words: str, pieces: Sequence[str], length: int
) -> Tensor:
    """Where each piece of ``words`` ends, of letters with ``spans``; see ``LettersObjective.ends``.
    Empty if the pieces are not those of the words."""
    told = [span for span, letter in zip(spans, words, strict=True) if letter != " "]
    sizes = [len(piece.removeprefix("##")) for piece in pieces]
    if sum(sizes) != len(told):
        return torch.zeros(0, dtype=torch.long)
    ends, read = [], 0
    for size in sizes[:-1]:
        read += size
        ends.append((told[read - 1][1] + 1 + told[read][0] + 1) // 2)
    return torch.tensor([*ends, length])

"""Trains the second pass of a recogniser: to write what was said, from the drafts of the first.

The recogniser stays as it is, so its drafts are made once and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from narrows.errors import InputError
from narrows.model.fetch import sha256
from narrows.retrieve.clsr import WEIGHTS, Draft, Pieces, Recogniser
from narrows.retrieve.deliberation import Decoder, Deliberation, DeliberationConfig
from narrows.retrieve.rank import Embedder
from narrows.retrieve.speech_head import by_length, padded
from narrows.train.clsr import HeldOut, learnable
from narrows.train.hearing import Objective, Speech
from narrows.train.kept import kept
from narrows.train.loop import LoopOptions, processes, train

STAGE = "deliberation"


def run(
    text: Embedder,
    speech: Speech,
    held: Speech,
    out: Path,
    options: LoopOptions,
    *,
    batch: int = 32,
    seed: int = 0,
    decoder: Decoder | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, told: None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Train a second pass for the recogniser in ``out``, write it beside that and return the
    history. What is half done there is gone on from.

    Args:
        text: the text encoder of the recogniser.
        speech: what is learnt from.
        held: what is measured on at every checkpoint.
        batch: clips of an update.
        decoder: Whisper's; None for that of the recogniser's speech encoder.
        changes: of the second pass's config.

    Raises as ``train`` does, ModelError for a recogniser that is not there or a Whisper that
    cannot be read, InputError where there is nothing to learn from or to measure on.
    """
    if not held.clips:
        raise InputError("there are no held-out clips to measure on; give more")
    pieces = Pieces.of(text)
    recogniser = Recogniser.load(out, pieces).requires_grad_(False).to(pieces.table.device)
    torch.manual_seed(seed)
    own = recogniser.config
    config = DeliberationConfig(
        recogniser=sha256(out / WEIGHTS),
        vocab_size=own.vocab_size,
        width=own.width,
        state_size=own.state_size,
        speech_encoder=own.speech_encoder,
        **changes,
    )
    decoder = decoder or Decoder.load(own.speech_encoder, pieces)
    module = Deliberation(config, pieces, decoder).to(pieces.table.device)
    lesson = DeliberationObjective(module, recogniser, text, speech, batch=batch, seed=seed)
    work = out / "work" / STAGE
    told = f"{config.model_dump_json()} {lesson.digest} {batch} {seed}"
    with processes(pieces.table.device).main_process_first():
        lesson.draft(work / "drafts.safetensors", f"{config.recogniser} {lesson.digest}")
    measured = HeldOut(recogniser, text, held, module.revise)

    def check() -> dict[str, float]:
        module.eval()
        return measured.measure()

    history = train(
        module,
        lesson.gradients,
        work,
        options,
        data=hashlib.sha256(told.encode()).hexdigest()[:16],
        check=check,
        on_step=on_step,
    )
    if processes(pieces.table.device).is_main_process:
        module.eval().save(out)
    return [{**row, "stage": STAGE} for row in history]


class DeliberationObjective(Objective):
    """Cross-entropy of the pieces said, at as many places as there are pieces.

    Args:
        module: what learns.
        recogniser: what makes the drafts.
        text: the text encoder, in whose pieces both write.
        speech, batch, seed: see ``Objective``.
    """

    module: Deliberation

    def __init__(
        self,
        module: Deliberation,
        recogniser: Recogniser,
        text: Embedder,
        speech: Speech,
        *,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        self.targets, usable = learnable(speech.clips, text)
        super().__init__(module, speech, usable, batch=batch, seed=seed)
        self.recogniser = recogniser
        self._drafts: dict[int, tuple[Tensor, Tensor]] = {}

    def draft(self, path: Path, origin: str) -> None:
        """Draft all clips, or take what is kept at ``path``, see ``narrows.train.kept``; about 40
        MB an hour of speech. Comes before the first loss."""
        told = hashlib.sha256(origin.encode()).hexdigest()[:16]
        found = kept(path, told, self._made)
        sizes = [len(self.targets[i]) for i in self.usable]
        split = (torch.split(found[name], sizes) for name in ("embeds", "vectors"))
        self._drafts = dict(zip(self.usable, zip(*split, strict=True), strict=True))

    def loss(self, picked: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss of clips, with gradients, which is its part ``second``, and the share of pieces
        that are ``second_wrong``."""
        device = self.recogniser.table.device
        states, mask = padded([self.speech.states(i) for i in picked], device)
        counts = torch.tensor([len(self.targets[i]) for i in picked], device=device)
        wanted = torch.cat([self.targets[i] for i in picked]).to(device)
        embeds, vectors = (
            nn.utils.rnn.pad_sequence([one.float() for one in part], batch_first=True).to(device)
            for part in zip(*(self._drafts[i] for i in picked), strict=True)
        )
        draft = Draft(embeds, vectors, counts)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                scores = self.recogniser.scores(vectors[draft.places])
            revised = self.module(states, mask, draft, scores)
        loss = cross_entropy(revised, wanted)
        wrong = (revised.detach().argmax(1) != wanted).float().mean()
        return loss, {"second": float(loss.detach()), "second_wrong": float(wrong)}

    @torch.no_grad()
    def _made(self) -> dict[str, Tensor]:
        """Of all usable clips, bfloat16 ``embeds`` and ``vectors`` of their pieces, clip after
        clip."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        device = self.recogniser.table.device
        for some in by_length([self.speech.length(i) for i in self.usable]):
            picked = [self.usable[place] for place in some]
            states, mask = padded([self.speech.states(i) for i in picked], device)
            counts = torch.tensor([len(self.targets[i]) for i in picked], device=device)
            with torch.autocast(device.type, torch.bfloat16):
                draft, _ = self.recogniser.draft(states, mask, counts)
            for i, own, other, n in zip(picked, *draft, strict=True):
                found[i] = own[:n].bfloat16().cpu(), other[:n].bfloat16().cpu()
        embeds, vectors = zip(*(found[i] for i in self.usable), strict=True)
        return {"embeds": torch.cat(embeds), "vectors": torch.cat(vectors)}

"""Phrases: the token that most often followed the last few, in answers the model gave before.

An n-gram model with back-off (Katz, 1987) cut down to the likeliest token behind each run of one to
LONGEST tokens, and how likely it is. An extension of our own: what it guesses costs next to nothing
to make, so it pays at batches where a module's guesses do not. ``narrows.train.phrases`` makes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrows.config import Settings
from narrows.contracts import Asked, Drafter, Offer, Sort
from narrows.draft.specs import shipped_for
from narrows.errors import ConfigError, ModelError
from narrows.files import replacing
from narrows.model.flat import FlatModel
from narrows.ops.ngrams import Runs

FILE = "phrases.safetensors"
LONGEST = 4
"""Tokens of the longest run looked up."""
LEAST = 0.2
"""Chance below which a guess is not made: no step has it verified."""


@dataclass(frozen=True)
class Phrases:
    """What ``ngrams.Runs`` holds, of the model with that ``fingerprint``."""

    fingerprint: str
    keys: Tensor
    tokens: Tensor
    sorts: Tensor
    chances: Tensor

    def save(self, folder: Path) -> None:
        """Write them to FILE in ``folder``, beside and then renamed. Raises InputError."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name) for name in TENSORS}
        with replacing(folder / FILE) as beside:
            save_file(tensors, beside, metadata={"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, folder: Path) -> Phrases:
        """What ``save`` wrote. Raises ModelError if it is not there, or not whole."""
        try:
            with safe_open(folder / FILE, "pt") as file:
                fingerprint = (file.metadata() or {})["fingerprint"]
                made = cls(fingerprint, *(file.get_tensor(name) for name in TENSORS))
        except Exception as error:
            raise ModelError(f"cannot read phrases from {folder}: {error}") from None
        if not made._whole():
            raise ModelError(f"{folder / FILE} does not hold phrases; make them again")
        return made

    def _whole(self) -> bool:
        if tuple(getattr(self, name).dtype for name in TENSORS) != tuple(TENSORS.values()):
            return False
        sizes = {tuple(x.shape) for x in (self.keys, self.tokens, self.sorts)}
        if sizes != {(len(self.keys),)} or self.chances.ndim != 1:
            return False
        if not bool((self.keys.diff() > 0).all()) or bool((self.tokens < 0).any()):
            return False
        return not len(self.sorts) or int(self.sorts.max()) < len(self.chances)


TENSORS = {
    "keys": torch.int64,
    "tokens": torch.int32,
    "sorts": torch.uint8,
    "chances": torch.float32,
}


class PhraseOptions(Settings):
    """``folder`` holds the phrases, those that come with the package by default; ``most`` tokens of
    a draft."""

    folder: Path | None = None
    most: Annotated[int, Field(ge=1, le=16)] = 4


class PhraseDrafter(Drafter):
    """Guesses what ``phrases`` have behind the longest run that ends a text, and on from there."""

    name = "phrases"

    def __init__(self, phrases: Phrases, most: int = 4) -> None:
        self.most = most
        self._runs = Runs(phrases.keys, phrases.tokens, phrases.sorts, phrases.chances)
        self._sorts = [Sort(chance) for chance in phrases.chances.tolist()]

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """See Drafter. One offer at most."""
        offers: list[list[Offer]] = []
        found = self._runs.behind([one.tokens for one in asked], LONGEST, self.most, LEAST)
        for one, places in zip(asked, found, strict=True):
            some = places[: one.k]
            sorts = tuple([self._sorts[self._runs.sorts[at]] for at in some])
            tokens = [self._runs.tokens[at] for at in some]
            offers.append([Offer(self.name, sorts, tokens=tokens)] if some else [])
        return offers


def phrases(target: FlatModel, **options: Any) -> PhraseDrafter:
    """The drafter of PhraseOptions for ``target``. Raises ConfigError if there are none for it or
    they are of another model, ModelError if they cannot be read."""
    chosen = PhraseOptions(**options)
    folder = chosen.folder or shipped_for(target)
    if folder is None:
        raise ConfigError(
            f"no phrases are shipped for {target.name}; make some with narrows train phrases and "
            "name their folder, phrases:folder=DIR"
        )
    found = Phrases.load(folder)
    if found.fingerprint != target.fingerprint:
        raise ConfigError(
            f"the phrases in {folder} are another model's (fingerprint {found.fingerprint}, but "
            f"{target.name} has {target.fingerprint})"
        )
    if len(found.tokens) and int(found.tokens.max()) >= target.shape.vocab_size:
        raise ModelError(f"{folder / FILE} has tokens outside the vocabulary of {target.name}")
    return PhraseDrafter(found, chosen.most)

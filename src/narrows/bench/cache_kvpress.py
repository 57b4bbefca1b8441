"""kvpress's evicting caches as subjects of ``narrows bench cache``, on the same token ids."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from narrows.bench.kvpress_job import PRESSES
from narrows.bench.peers import KVPRESS, Session
from narrows.errors import ConfigError

PREFIX = "kvpress-"


def parse_kvpress(name: str) -> tuple[str, float] | None:
    """Press and share kept of ``kvpress-press@share``; None for another peer. Raises ConfigError
    for one that kvpress cannot be asked for."""
    if not name.startswith(PREFIX):
        return None
    press, _, share = name.removeprefix(PREFIX).partition("@")
    if press not in PRESSES:
        known = ", ".join(PREFIX + p for p in PRESSES)
        raise ConfigError(f"unknown peer {name!r} (known: {known}, each with @ and the share kept)")
    try:
        kept = float(share)
    except ValueError:
        kept = 0.0
    if not 0 < kept <= 1:
        raise ConfigError(f"peer {name!r}: give the share kept, such as {PREFIX}{press}@0.5")
    return press, kept


class Pressed:
    """The cache of one sequence, in the other environment."""

    def __init__(self, session: Session, number: int, held: int) -> None:
        self.number, self.held = number, held
        weakref.finalize(self, session.tell, {"forget": number})


class KVPress:
    """kvpress in its own environment. Compared with transformers' own dense cache."""

    engine = "transformers"
    compressing_s = 0.0

    def __init__(self, session: Session, name: str, bits: float) -> None:
        """``session``: see ``open_session``; all kvpress peers share it. ``bits`` of a number."""
        parsed = parse_kvpress(name)
        assert parsed is not None
        self.method = name
        self.press, self.kept = parsed
        self.nominal_bits = bits
        self.session = session

    def read(self, prompt: Sequence[int]) -> Pressed:
        """See Subject; in one pass."""
        told = self.session.ask({"read": list(prompt), "press": self.press, "ratio": 1 - self.kept})
        return Pressed(self.session, told["reader"], told["held"])

    def fill(self, tokens: int, seed: int) -> Pressed:
        """See Subject; random tokens, to have attention to go by."""
        chance = torch.Generator().manual_seed(seed)
        return self.read(torch.randint(0, 1000, (tokens,), generator=chance).tolist())

    def step(self, readers: Sequence[Pressed], tokens: Sequence[int]) -> Tensor:
        """See Subject; one reader after the other."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "logits.npy")
            pairs = [(r.number, t) for r, t in zip(readers, tokens, strict=True)]
            told = self.session.ask({"step": pairs, "file": str(file)})
            logits = torch.from_numpy(np.load(file, allow_pickle=False))
        for reader, held in zip(readers, told["held"], strict=True):
            reader.held = held
        return logits

    def held(self, reader: Pressed) -> int:
        """See Subject."""
        return reader.held


def open_session(model: Path, dtype: str) -> Session:
    """A running kvpress with this model. Raises as ``Rival.open``."""
    return KVPRESS.open({"model": str(model.resolve()), "dtype": dtype})

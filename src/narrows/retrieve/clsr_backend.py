"""CLSR for ``narrows listen``: a recogniser, and behind it a second pass where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from narrows.errors import ConfigError
from narrows.model import ctranslate2, hub
from narrows.model.saved import load_config
from narrows.retrieve.audio import Wave
from narrows.retrieve.clsr import (
    GUESSES,
    NAME,
    SILENT,
    WEIGHTS,
    ClsrConfig,
    Pieces,
    Recogniser,
    Revise,
    Written,
    embedded,
    in_words,
)
from narrows.retrieve.deliberation import Deliberation
from narrows.retrieve.hearing import Guesses, Heard
from narrows.retrieve.speech_head import HeadBackend

SHIPPED = Path(__file__).with_name("shipped") / "clsr"
"""A recogniser that comes with the package; its card tells how it was made."""


class ClsrBackend(HeadBackend):
    """Searches what a recogniser reads into the pieces of its text encoder. See ``HeadBackend``.

    Args:
        folder: the recogniser's; the default is the shipped one.
        passes: 2 has its drafts revised by the decoder of its speech encoder, see
            ``narrows.retrieve.deliberation``; 1 leaves them as the paper does.

    Raises ConfigError for another number of passes.
    """

    name, weights = "clsr", WEIGHTS

    def __init__(self, folder: str = str(SHIPPED), passes: str = "2") -> None:
        super().__init__(folder)
        if passes not in ("1", "2"):
            raise ConfigError(f"passes must be 1 or 2 (given: {passes!r})")
        self._twice = passes == "2"

    @cached_property
    def hears(self) -> str:
        """See ``hearing.Backend``."""
        return f"{super().hears} twice" if self._twice else super().hears

    @cached_property
    def config(self) -> ClsrConfig:
        """The recogniser's."""
        return load_config(self._folder, ClsrConfig, NAME)

    @cached_property
    def recogniser(self) -> Recogniser:
        """What stands between the two encoders."""
        module = Recogniser.load(self._folder, Pieces.of(self.embedder))
        return module.to(module.table.device)

    @cached_property
    def revise(self) -> Revise | None:
        """What reads its drafts again."""
        if not self._twice:
            return None
        name = self.config.speech_encoder
        if not ctranslate2.is_model(hub.resolve(name) / ctranslate2.WEIGHTS):
            raise ConfigError(
                f"{name} is no Whisper in CTranslate2's form, whose decoder makes the second pass; "
                "give passes=1"
            )
        second = Deliberation.load(name, Pieces.of(self.embedder))
        if second.state_size != self.config.state_size:
            raise ConfigError(
                f"{name} has states of {second.state_size} numbers and the "
                f"recogniser in {self._folder} reads {self.config.state_size}; give passes=1"
            )
        return second

    def write(self, waves: Sequence[Wave]) -> list[Written]:
        """The pieces said in each clip, with their times. In a clip shorter than LEAST_S nothing
        is said."""
        states = self.states(waves)
        written = self.recogniser.recognise([*states.values()], self.revise)
        found = dict(zip(states, written, strict=True))
        return [found.get(i, SILENT) for i in range(len(waves))]

    def hear(self, waves: Sequence[Wave]) -> list[Heard]:
        """See ``hearing.Backend``."""
        written = self.write(waves)
        vectors = embedded([one.ids for one in written], self.embedder)
        heard = []
        for one, vector in zip(written, vectors, strict=True):
            ids = np.array(one.guesses, np.int32).reshape(-1, GUESSES)
            guesses = Guesses(ids, np.array(one.chances, np.float16).reshape(ids.shape))
            tokens = np.array(one.ids, np.int32)
            heard.append(Heard(in_words(one.ids, self.embedder), tokens, vector, guesses))
        return heard

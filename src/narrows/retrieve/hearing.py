"""What a recogniser has to offer for speech to be searched, and the recognisers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from narrows.registry import Registry
from narrows.retrieve.audio import Wave


@dataclass(frozen=True, slots=True, eq=False)
class Guesses:
    """What each of the ``n`` tokens of a clip may be: ``ids`` int32 ``[n, k]`` of word pieces, the
    likeliest first, and their ``chances`` float16 ``[n, k]``."""

    ids: NDArray[np.int32]
    chances: NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """What was made of one clip: its ``text``, that as ``tokens`` int32 ``[n]`` of the text
    encoder without special ones, and a unit ``vector`` float32 ``[d]``; zeros where nothing was
    said. A recogniser that has more than one ``guesses`` of each token may give them."""

    text: str
    tokens: NDArray[np.int32]
    vector: NDArray[np.float32]
    guesses: Guesses | None = None


NOTHING = Heard("", np.zeros(0, np.int32), np.zeros(0, np.float32))
"""Where nothing is said, or looked for."""


class Backend(Protocol):
    """Hears clips, and puts questions where what was heard is."""

    @property
    def hears(self) -> str:
        """Name and revision of what turns sound into text."""

    @property
    def encodes(self) -> str:
        """Name and revision of what turns text into vectors. Only those of one encoder can be
        compared."""

    @property
    def verbatim(self) -> bool:
        """Whether its text is good enough to answer from."""

    def hear(self, waves: Sequence[Wave]) -> list[Heard]:
        """What is said in each clip; see ``narrows.retrieve.clips``."""

    def embed(self, question: str) -> NDArray[np.float32]:
        """The unit vector ``[d]`` of a question. Raises InputError for an empty one."""

    def pieces(self, question: str) -> list[int]:
        """The word pieces of a question, as those of ``Heard.tokens``."""


BACKENDS: Registry[Callable[..., Backend]] = Registry("listening backend")
"""Name -> callable that makes the backend of options given as strings (see ``registry.build``); its
models are loaded when they are first used."""

BACKENDS.add("transcript", "narrows.retrieve.transcribe:TranscriptBackend")
BACKENDS.add("clsr", "narrows.retrieve.clsr_backend:ClsrBackend")
BACKENDS.add("dual", "narrows.retrieve.dual:DualBackend")

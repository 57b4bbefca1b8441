"""Where in a stream somebody speaks: Silero's voice detector, which faster-whisper carries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from narrows.errors import ConfigError
from narrows.retrieve.audio import Wave

FRAME = 512
"""Samples that are judged at once: 32 ms."""

CONTEXT = 64
"""Samples before a frame that are seen with it."""

UNITS = 128
"""Size of what the detector remembers."""

Detector = Callable[[Wave], NDArray[np.float32]]
"""Takes the next ``[n * FRAME]`` samples of a stream and gives the probability of speech in each
frame, ``[n]``."""


class Silero:
    """A Detector that remembers what it heard, so that any chunking of a stream gives the same.
    One for each stream. Raises ConfigError without the packages it takes."""

    def __init__(self) -> None:
        try:
            from faster_whisper.vad import get_vad_model

            self._session = get_vad_model().session
        except (ImportError, RuntimeError):
            raise ConfigError(
                "finding speech needs faster-whisper: pip install 'narrows[listen]'"
            ) from None
        self._state = {name: np.zeros((1, 1, UNITS), np.float32) for name in ("h", "c")}
        self._seen = np.zeros(CONTEXT, np.float32)

    def __call__(self, wave: Wave) -> NDArray[np.float32]:
        """See Detector."""
        if not len(wave):
            return np.zeros(0, np.float32)
        frames = wave.reshape(-1, FRAME)
        before = np.concatenate([self._seen[None], frames[:-1, -CONTEXT:]])
        self._seen = wave[-CONTEXT:]
        heard = np.concatenate([before, frames], axis=1)
        made, self._state["h"], self._state["c"] = self._session.run(
            None, {"input": heard, **self._state}
        )
        probabilities: NDArray[np.float32] = made.reshape(-1)
        return probabilities

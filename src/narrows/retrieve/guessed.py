"""BM25 over words that may have been said.

An extension of ours. A recogniser that is unsure of a word often has the right one among its next
guesses. Here every guess counts as a part of an occurrence, so that rare words are found which the
transcript has wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from narrows.retrieve.hearing import Guesses

K1, B = 1.5, 0.75
"""As in ``narrows.retrieve.rank.BM25``."""
POWER = 0.25
"""A guess of chance ``p`` counts as ``p ** POWER`` occurrences: small chances say more than they
claim, since right words that were missed have small ones. The best of what was tried on questions
of articles that recognisers learn from."""


class GuessedBM25:
    """Lucene's form of BM25 over clips of guessed word pieces: a piece occurs in a clip as often as
    the guesses of it there count together, and in as many clips as the sum over clips of that, of
    each at most 1. A clip's length is its number of tokens."""

    def __init__(self, clips: Sequence[Guesses]) -> None:
        self._count = len(clips)
        lengths = np.array([len(one.ids) for one in clips], np.int64)
        width = clips[0].ids.shape[1] if clips else 0
        ids = np.concatenate([np.zeros(0, np.int32), *(one.ids.ravel() for one in clips)])
        none = np.zeros(0, np.float16)
        chances = np.concatenate([none, *(one.chances.ravel() for one in clips)])
        rows = np.repeat(np.arange(self._count), lengths * width)
        cells, places = np.unique(ids * np.int64(self._count) + rows, return_inverse=True)
        occurs = np.bincount(places, chances.astype(np.float64) ** POWER, len(cells))
        self._clips = cells % max(1, self._count)
        self._pieces, starts = np.unique(cells // max(1, self._count), return_index=True)
        self._starts = np.append(starts, len(cells))
        held = np.add.reduceat(np.minimum(occurs, 1.0), starts) if len(starts) else starts
        self._rarity = np.log1p((self._count - held + 0.5) / (held + 0.5))
        mean = lengths.mean() if lengths.any() else 1.0
        usual = K1 * (1 - B + B * lengths / mean)
        self._shares = occurs / (occurs + usual[self._clips])

    def score(self, pieces: Sequence[int]) -> NDArray[np.float64]:
        """Scores ``[len(clips)]`` of a question of these word pieces; one that comes twice counts
        twice. A clip in which none of them may have been said scores 0."""
        scores = np.zeros(self._count)
        for piece in pieces:
            at = int(np.searchsorted(self._pieces, piece))
            if at < len(self._pieces) and self._pieces[at] == piece:
                own = slice(self._starts[at], self._starts[at + 1])
                scores[self._clips[own]] += self._rarity[at] * self._shares[own]
        return scores

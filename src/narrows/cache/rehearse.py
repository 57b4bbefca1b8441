"""Reading a prompt once more behind itself, for scorers that watch what its repetition attends
to.

After KVzip (arXiv 2505.23416): a chunk at a time, behind a request to repeat the text; nothing of
it stays in the caches. The words of the request are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from narrows.cache.dense import DenseLayer
from narrows.contracts import LayerCache

if TYPE_CHECKING:
    from narrows.model.flat import FlatModel

CHUNK = 1024
"""Tokens of the prompt repeated in one pass."""
LONGEST = CHUNK + 64
"""Most tokens a pass appends, the request included."""
REMINDER = 8
"""Tokens of the chunk before that the request quotes."""

FIRST = "\n\nWrite the whole text above again, word for word:\n\n"
LATER = "\n\nWrite the text above again, word for word, and go on from here:"


def rehearse(model: FlatModel, caches: Sequence[LayerCache], prompt: Sequence[int]) -> None:
    """Show the scorers of ``caches``, which have just read ``prompt``, its repetition. Leaves the
    caches as they were. Costs about one more reading of the prompt, at its full length."""
    scorers = [s for c in caches if (s := getattr(c, "scorer", None)) is not None]
    size = min(CHUNK, model.shape.max_tokens // 2)
    for start in range(0, len(prompt), size):
        part = list(prompt[start : start + size])
        ids = _request(model, prompt[max(0, start - REMINDER) : start]) + part
        # A prompt that fills the window leaves no places behind it, so the last ones serve twice.
        first = min(len(prompt), model.shape.max_tokens - len(ids))
        for scorer in scorers:
            scorer.rehearsal = (start, start + len(part))
        _read_and_forget(model, caches, ids, first)
        for scorer in scorers:
            scorer.rehearsal = None


def _read_and_forget(
    model: FlatModel, caches: Sequence[LayerCache], ids: list[int], first: int
) -> None:
    # A sliding layer frees what a long rollback would bring back, so it works on a copy.
    sliding = [isinstance(c, DenseLayer) and c.shape.window is not None for c in caches]
    used = [copy.deepcopy(c) if s else c for c, s in zip(caches, sliding, strict=True)]
    model.read(ids, used, first)
    for cache, slides in zip(caches, sliding, strict=True):
        if not slides:
            cache.rollback(len(ids))


def _request(model: FlatModel, last: Sequence[int]) -> list[int]:
    if model.tokenizer is None:
        return []
    text = LATER if last else FIRST
    asked: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*asked, *last]

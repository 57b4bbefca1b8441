"""Word pieces by how they are spelt, for a recogniser that has heard few of them.

An extension of ours. An embedding table of text knows what pieces mean, not how they sound: a piece
that was never said in training is not found by its sound. Spelling comes near to it, and all pieces
share their short runs of letters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST = 3
"""Letters of a run, the mark of a word's beginning counted."""
LEAST = 3
"""Pieces that have to share a run for it to be known."""


def runs(piece: str) -> list[str]:
    """All runs of up to LONGEST letters of a word piece. One that begins a word has ``^`` before
    its first letter; one that goes on (``##``) has not. None for a piece of other signs than
    a to z and the apostrophe."""
    if not re.fullmatch(r"(##)?[a-z']+", piece):
        return []
    text = piece.removeprefix("##") if piece.startswith("##") else f"^{piece}"
    return [text[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1)]


def spelt(pieces: Sequence[str]) -> Tensor:
    """Sparse (COO) float32 ``[len(pieces), r]``: which of the ``r`` known runs, in alphabetical
    order, each piece is made of. The squares of a row sum to 1, so that long and short pieces weigh
    alike; a row is empty for a piece without runs."""
    found = [sorted(set(runs(piece))) for piece in pieces]
    sharing = Counter(run for own in found for run in own)
    known = {run: i for i, run in enumerate(sorted(r for r, n in sharing.items() if n >= LEAST))}
    places, values = [], []
    for number, own in enumerate(found):
        columns = [known[run] for run in own if run in known]
        places += [(number, column) for column in columns]
        values += [len(columns) ** -0.5 for _ in columns]
    # On the CPU whatever the default device is: modules are made on "meta" before they are loaded.
    return torch.sparse_coo_tensor(
        torch.tensor(places, device="cpu").reshape(-1, 2).T,
        torch.tensor(values, device="cpu"),
        size=(len(pieces), len(known)),
        device="cpu",
        check_invariants=True,
    ).coalesce()

"""Value heads of fewer numbers: which stay, or which combinations of them.

No rotation stands between the value and output projections, so that any basis of a smaller value
space will do. ``heads`` query heads read one value head: its group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def strided(value: Tensor, out: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Every ``d / kept``-th number (paper, formula 5).

    ``value`` ``[d, inputs]`` are one value head's rows, ``out`` ``[heads, hidden, d]`` the columns
    of the output projection that read it; returned with ``kept`` in place of ``d``.
    """
    size = value.shape[0]
    at = torch.tensor([i * size // kept for i in range(kept)])
    return value[at], out[:, :, at]


def projected(value: Tensor, out: Tensor, kept: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The combinations that lose least of what the group adds to the hidden states, squared and
    summed over inputs with the second moment ``inputs`` ``[inputs, inputs]``: by Eckart and Young
    the leading singular vectors. With the identity, the singular value decomposition of the
    weights; else activation-aware. Arguments and result as ``strided``; both factors get rows and
    columns of equal length. An extension; float64.
    """
    heads, hidden, size = out.shape
    stacked = out.reshape(heads * hidden, size)
    frame, upper = torch.linalg.qr(stacked)
    rows = upper @ value  # what a group adds, in the frame's coordinates
    basis = torch.linalg.eigh(rows @ inputs @ rows.T).eigenvectors[:, -kept:].flip(1)
    value, stacked = basis.T @ rows, frame @ basis
    balance = value.norm(dim=1).clamp(min=1e-30).sqrt()
    value, stacked = value / balance[:, None], stacked * balance
    return value, stacked.view(heads, hidden, kept)

"""One token's values to codes in a single call: ``quantise`` and ``value_lines``, fast."""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ops.native import library

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in fold.c


def fold_value(
    x: Tensor, bits: int, eta: float, lines: Tensor | None, scale: Tensor, zero: Tensor, token: int
) -> bool:
    """Quantise the first token of ``x`` ``[heads, n, dim]`` as token number ``token``, and move the
    others up by one place. Its codes go into ``lines`` (in the order of ``value_lines``, zeros at
    the token's places; None stores none), scale and zero into ``[heads, tokens, groups]``. Equal
    to ``quantise`` to the bit.

    False, and nothing done, where this does not run here or a number is not finite in its type.
    """
    native = library()
    if native is None or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    heads, used, dim = x.shape
    if x.stride()[1:] != (dim, 1) or scale.stride() != zero.stride() or scale.dtype not in KINDS:
        return False
    store = (None, 0) if lines is None else (lines.data_ptr(), lines.stride(0))
    failed = native.fold_value(
        *(x.data_ptr(), x.dtype is torch.bfloat16, x.stride(0), used),
        *(heads, dim, dim // scale.shape[2]),
        *(bits, eta, 1.0 - 2.0 * eta, *store, scale.data_ptr(), zero.data_ptr()),
        *(scale.stride(0), KINDS[scale.dtype], token),
    )
    return not failed

"""Codes of few bits for keys and values: arithmetic, packing, and the order codes are stored in.

The definitions, in plain torch. Keys are quantised per channel (a group is ``group`` consecutive
tokens of one head and channel), values per token (a group is ``value_group`` consecutive channels
of one head and token), after KIVI (arXiv 2402.02750); calibration and borrowed codes are XQuant's
(arXiv 2510.11236). All arithmetic is float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

BITS = (1, 2, 4, 8)
Fit = Literal["minmax", "lsq", "mean"]

QUAD = 4
"""Neighbours of the contracted axis (channels of keys, tokens of values) that stand together."""
LANES = 16
"""Neighbours of the other axis in a line of ``LANES * QUAD`` codes."""
LINE = LANES * QUAD


class Coded(NamedTuple):
    """Codes uint8 ``[..., groups, size]`` and the float32 ``[..., groups]`` scale and zero that
    give ``code * scale + zero`` back."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


# ----------------------------------------------------------------------------------- arithmetic


def quantise(x: Tensor, bits: int, eta: float = 0.0) -> Coded:
    """Asymmetric min-max codes of the groups ``[..., groups, size]`` of ``x`` (sheet 3.1).

    ``scale = (max - min) / levels``, codes rounded half to even; then the outermost levels are
    drawn in by ``eta`` of the range, which changes scale and zero only (4.2). A group without
    range gets scale 0 and codes 0. NaN and infinities go through to scale and zero.
    """
    levels = 2**bits - 1
    x = x.float()
    low, high = x.aminmax(dim=-1)
    scale = (high - low) / levels
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = ((x - low[..., None]) / step[..., None]).clamp(0, levels).round()
    return Coded(codes.nan_to_num(0.0).to(torch.uint8), *calibrate(scale, low, bits, eta))


def calibrate(scale: Tensor, zero: Tensor, bits: int, eta: float) -> tuple[Tensor, Tensor]:
    """Scale and zero with the outermost levels drawn in: the zero moves by ``eta`` of the range
    (with the scale as it was), then the scale shrinks by ``1 - 2 eta``."""
    levels = 2**bits - 1
    return (1.0 - 2.0 * eta) * scale, zero + eta * scale * levels


def borrow(
    codes: Tensor, x: Tensor, bits: int, fit: Fit, eta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Scale and zero ``[..., groups]`` with which another layer's ``codes`` ``[..., groups, size]``
    stand for ``x``.

    "minmax" is the paper's: those of x's own codes (5.4). "lsq" minimises the squared error (our
    extension): ``scale = cov / var``, never worse than "mean", whose scale is 0 and whose zero is
    the group's mean (the control without code bits).
    """
    x = x.float()
    if fit == "minmax":
        coded = quantise(x, bits, eta)
        return coded.scale, coded.zero
    mean = x.mean(-1)
    if fit == "mean":
        return torch.zeros_like(mean), mean
    code = codes.float()
    middle = code.mean(-1)
    offset = code - middle[..., None]
    variance = offset.square().mean(-1)
    covariance = (offset * (x - mean[..., None])).mean(-1)
    scale = covariance / torch.where(variance > 0, variance, torch.ones_like(variance))
    return scale, mean - scale * middle


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``code * scale + zero``: float32 ``[..., groups, size]``."""
    return codes.float() * scale.float()[..., None] + zero.float()[..., None]


# -------------------------------------------------------------------------------------- packing


def pack(codes: Tensor, bits: int) -> Tensor:
    """``8 / bits`` codes a byte along the last axis, low bits first: uint8 ``[..., n]`` ->
    ``[..., n * bits / 8]``. On a little-endian machine the same bytes as packing into int32 words
    (sheet 3.4)."""
    each = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
    out: Tensor = parts[..., 0].clone()
    for i in range(1, each):
        out |= parts[..., i] << (i * bits)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes ``pack`` was given."""
    if bits == 8:
        return packed.clone()
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


# ------------------------------------------------------------------------- the order in storage


def key_lines(codes: Tensor, bits: int) -> Tensor:
    """Key codes ``[heads, tokens, dim]`` (tokens a multiple of LANES, dim of QUAD) as stored:
    uint8 ``[heads, tokens / 16, dim / 4, 8 * bits]``; a line holds 16 tokens of 4 channels, the
    channels of a token side by side."""
    heads, tokens, dim = codes.shape
    lines = codes.view(heads, tokens // LANES, LANES, dim // QUAD, QUAD).transpose(2, 3)
    return pack(lines.flatten(-2), bits)


def key_codes(lines: Tensor, bits: int) -> Tensor:
    """The codes ``key_lines`` was given."""
    heads, blocks, quads, _ = lines.shape
    codes = unpack(lines, bits).view(heads, blocks, quads, LANES, QUAD).transpose(2, 3)
    return codes.reshape(heads, blocks * LANES, quads * QUAD)


def value_lines(codes: Tensor, bits: int) -> Tensor:
    """Value codes ``[heads, tokens, dim]`` (tokens a multiple of QUAD, dim of LANES) as stored:
    uint8 ``[heads, tokens / 4, dim / 16, 8 * bits]``; a line holds 4 tokens of 16 channels, the
    tokens of a channel side by side."""
    heads, tokens, dim = codes.shape
    lines = codes.view(heads, tokens // QUAD, QUAD, dim // LANES, LANES).permute(0, 1, 3, 4, 2)
    return pack(lines.flatten(-2), bits)


def value_codes(lines: Tensor, bits: int) -> Tensor:
    """The codes ``value_lines`` was given."""
    heads, quads, blocks, _ = lines.shape
    codes = unpack(lines, bits).view(heads, quads, blocks, LANES, QUAD).permute(0, 1, 4, 2, 3)
    return codes.reshape(heads, quads * QUAD, blocks * LANES)


def key_groups(x: Tensor, group: int) -> Tensor:
    """``[heads, tokens, dim]`` -> ``[heads, tokens / group, dim, group]``: groups of keys last."""
    heads, tokens, dim = x.shape
    return x.view(heads, tokens // group, group, dim).transpose(2, 3)


def from_key_groups(x: Tensor) -> Tensor:
    """``key_groups`` undone."""
    return x.transpose(2, 3).flatten(1, 2)


def value_groups(x: Tensor, group: int) -> Tensor:
    """``[heads, tokens, dim]`` -> ``[heads, tokens, dim / group, group]``."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)

"""The two kernels of a decoder layer are the operators they are made of, to the bit."""

from __future__ import annotations

import pytest
import torch

from narrows.ops import decoder
from narrows.ops.decoder import Layer, after_attention, before_attention
from narrows.ops.native import library

HIDDEN, HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, WIDE = 96, 6, 2, 32, 16, 160


def layer(dtype: torch.dtype, biased: bool, normed: bool) -> Layer:
    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / 10).to(dtype)

    row = (HEADS + KV_HEADS) * KEY_DIM + KV_HEADS * VALUE_DIM
    return Layer(
        qkv=weight(row, HIDDEN),
        out=weight(HIDDEN, HEADS * VALUE_DIM),
        gate_up=weight(2 * WIDE, HIDDEN),
        down=weight(HIDDEN, WIDE),
        first_norm=torch.rand(HIDDEN) + 0.5,
        second_norm=torch.rand(HIDDEN) + 0.5,
        qkv_bias=torch.randn(row) if biased else None,
        out_bias=torch.randn(HIDDEN) if biased else None,
        q_norm=torch.rand(KEY_DIM) + 0.5 if normed else None,
        k_norm=torch.rand(KEY_DIM) + 0.5 if normed else None,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        key_dim=KEY_DIM,
        value_dim=VALUE_DIM,
        wide=WIDE,
        eps=1e-5,
        scale=KEY_DIM**-0.5,
    )


@pytest.mark.skipif(library() is None, reason="no compiler here")
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_kernels_are_the_operators_they_are_made_of(monkeypatch, rows, biased, normed):
    torch.manual_seed(rows)
    made = layer(torch.bfloat16, biased, normed)
    h, delta = torch.randn(rows, HIDDEN), torch.randn(rows, HIDDEN)
    cosine, sine = torch.randn(2, rows, KEY_DIM)
    mixed = torch.randn(rows, HEADS, VALUE_DIM).transpose(0, 1).contiguous().transpose(0, 1)
    found = []
    for fast in (True, False):
        monkeypatch.setattr(decoder, "few_rows", lambda rows, weight, fast=fast: fast)
        states, outcomes = h.clone(), []
        for before in (None, delta):
            outcomes.append(before_attention(made, states, before, cosine, sine))
            outcomes.append(states.clone())
        outcomes.append(after_attention(made, states, mixed.reshape(rows, -1)))
        found.append([*outcomes, states])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].shape == (rows, len(made.qkv))
    assert made.ends == (HEADS * KEY_DIM, (HEADS + KV_HEADS) * KEY_DIM)


def test_float32_weights_need_no_kernel():
    made = layer(torch.float32, biased=True, normed=True)
    h, (cosine, sine) = torch.randn(3, HIDDEN), torch.randn(2, 3, KEY_DIM)
    x = h / (h.square().mean(-1, keepdim=True) + made.eps).sqrt() * made.first_norm
    right = x @ made.qkv.T + made.qkv_bias
    found = before_attention(made, h.clone(), None, cosine, sine)
    torch.testing.assert_close(found[:, made.ends[1] :], right[:, made.ends[1] :])

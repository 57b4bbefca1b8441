"""The kernel for many new tokens is causal attention for all shapes, up to bfloat16 rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.ops import flash
from narrows.ops.attention import causal_attention, visible
from narrows.ops.native import library

pytestmark = pytest.mark.skipif(
    library() is None or not library().flash_ready(), reason="no products of bfloat16 pairs here"
)


def inputs(n, past, groups, group, dim, value_dim, seed=0):
    """Keys and values lie in buffers with room for more, which is not a number."""
    torch.manual_seed(seed)
    q = torch.randn(n, groups * group, dim)
    buffers = [torch.full((groups, n + past + 5, d), torch.nan) for d in (dim, value_dim)]
    k, v = (x.bfloat16()[:, : n + past] for x in buffers)
    k.normal_()
    v.normal_()
    return q, k, v


SHAPES = {
    "n": st.integers(1, 200),
    "past": st.integers(0, 300),
    "groups": st.integers(1, 3),
    "group": st.integers(1, 5),
    "window": st.none() | st.integers(1, 400),
}


@settings(max_examples=60, deadline=None)
@given(
    **SHAPES,
    dim=st.sampled_from([8, 33, 64, 80, 128]),
    value_dim=st.sampled_from([5, 16, 64, 72, 128]),
)
def test_it_is_causal_attention(n, past, groups, group, dim, value_dim, window):
    q, k, v = inputs(n, past, groups, group, dim, value_dim)
    scale = dim**-0.5
    out = flash.flash_attention(q, k, v, scale, window)
    right = causal_attention(q, k.float(), v.float(), scale, window)
    torch.testing.assert_close(out, right, rtol=0.02, atol=0.03)


@settings(max_examples=30, deadline=None)
@given(
    **SHAPES,
    by_head=st.booleans(),
)
def test_it_adds_up_what_tokens_are_paid(n, past, groups, group, window, by_head):
    q, k, v = inputs(n, past, groups, group, 64, 32)
    heads, tokens = groups * group, n + past
    before = torch.rand((heads, tokens) if by_head else tokens)
    mass = before.clone()
    out = flash.flash_attention(q, k, v, 0.125, window, mass)
    assert torch.equal(out, flash.flash_attention(q, k, v, 0.125, window))
    keys = k.float().repeat_interleave(group, 0)
    scores = torch.einsum("nhd,hmd->hnm", (q * 0.125).bfloat16().float(), keys)
    scores.masked_fill_(~visible(past, n, tokens, window, q.device), -torch.inf)
    paid = scores.softmax(-1).sum(1)
    right = before + (paid if by_head else paid.sum(0))
    torch.testing.assert_close(mass, right, rtol=1e-4, atol=1e-4)


def test_it_can_keep_the_most_that_is_paid_in_a_stretch():
    q, k, v = inputs(150, 400, 2, 3, 64, 64)
    for stretch in ((0, 550), (37, 301), (300, 310)):
        mass = torch.zeros(6, 550)
        mass[0] = 0.9
        flash.flash_attention(q, k, v, 0.125, None, mass, stretch, most=True)
        keys = k.float().repeat_interleave(3, 0)
        scores = torch.einsum("nhd,hmd->hnm", (q * 0.125).bfloat16().float(), keys)
        scores.masked_fill_(~visible(400, 150, 550, None, q.device), -torch.inf)
        right = torch.zeros(6, 550)
        right[0] = 0.9
        a, b = stretch
        right[:, a:b] = torch.maximum(right[:, a:b], scores.softmax(-1).amax(1)[:, a:b])
        torch.testing.assert_close(mass, right, rtol=1e-4, atol=1e-5)


def test_tokens_are_alike_to_the_bit_in_any_chunks():
    q, k, v = inputs(300, 70, 2, 3, 64, 64)
    for window in (None, 90):
        whole = flash.flash_attention(q, k, v, 0.125, window)
        for a, b in ((0, 1), (1, 50), (50, 167), (167, 300)):
            part = flash.flash_attention(q[a:b], k[:, : 70 + b], v[:, : 70 + b], 0.125, window)
            assert torch.equal(part, whole[a:b])


def test_what_is_not_a_number_stays_with_those_who_see_it():
    q, k, v = inputs(150, 0, 1, 2, 64, 64)
    k[0, 100] = torch.nan
    out = flash.flash_attention(q, k, v, 0.125)
    assert out[:100].isfinite().all()
    assert out[100:].isnan().all()
    q[:] = 1e4  # scores beyond what an exponential can take
    k[0, 100] = 0
    assert flash.flash_attention(q, k, v, 0.125).isfinite().all()

"""The kernels of a decoder layer, and that of all of them, are the operators they are made of, to
the bit."""

from __future__ import annotations

import pytest
import torch

from narrows.ops import decoder
from narrows.ops.decoder import Decoder, Layer, after_attention, before_attention
from narrows.ops.native import library
from narrows.ops.places import Places
from narrows.ops.ragged import Place, append_attend

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
@pytest.mark.parametrize("rows", [1, 5, 64, 300])
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


@pytest.mark.skipif(library() is None, reason="no compiler here")
@pytest.mark.parametrize("rows", [None, [2, 3, 20]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_layers_in_one_call_are_one_after_the_other(dtype, rows):
    """With caches of ``dtype``, a window in one layer, sequences of one row and of several, and a
    place for all key heads, or one for each."""
    torch.manual_seed(0)
    layers = [layer(torch.bfloat16, n == 1, n == 2) for n in range(3)]
    counts, stored = [1, 3, 1, 16], [5, 300, 257, 40]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    buffers = [
        [
            (torch.randn(KV_HEADS, 320, KEY_DIM), torch.randn(KV_HEADS, 320, VALUE_DIM))
            for _ in counts
        ]
        for _ in layers
    ]
    h = torch.randn(sum(counts), HIDDEN)
    cosine, sine = torch.randn(2, sum(counts), KEY_DIM)
    found = []
    for at_once in (True, False):
        places = [
            [
                Place(
                    *(k[heads].to(dtype), v[heads].to(dtype), held + new, first, new),
                    head=heads.start,
                    window=40 if number == 1 else None,
                )
                for (k, v), held, first, new in zip(column, stored, firsts, counts, strict=True)
                for heads in ([slice(0, 2)] if held < 300 else [slice(0, 1), slice(1, 2)])
            ]
            for number, column in enumerate(buffers)
        ]
        gathered = Places()
        for column in places:
            gathered.add(column)
            gathered.end_layer()
        states, only = h.clone(), None if rows is None else torch.tensor(rows)
        seen = torch.zeros(len(rows or h), 2, HIDDEN)
        taps = {0: seen[:, 0], 2: seen[:, 1]}
        if at_once:
            delta = Decoder(layers)(states, cosine, sine, gathered, taps, only)
        else:
            delta = None
            for number, (one, column) in enumerate(zip(layers, places, strict=True)):
                qkv = before_attention(one, states, delta, cosine, sine)
                if number in taps:
                    taps[number].copy_(states if only is None else states[only])
                q, k, v = qkv.tensor_split(one.ends, 1)
                parts = (
                    x.unflatten(1, (n, -1)) for x, n in ((q, HEADS), (k, KV_HEADS), (v, KV_HEADS))
                )
                mixed = torch.empty(len(h), HEADS, VALUE_DIM)
                append_attend(column, *parts, one.scale, mixed)
                delta = after_attention(one, states, mixed.flatten(1))
        caches = [x for column in places for p in column for x in (p.k, p.v)]
        found.append([states, delta, seen, *caches])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert seen.abs().sum(2).all()


def test_layers_are_run_in_one_call_where_kernels_take_them(monkeypatch):
    made = Decoder([layer(torch.bfloat16, False, False)])
    assert made.takes(8) == (library() is not None)
    assert not made.takes(100_000)
    assert not Decoder([layer(torch.float32, False, False)]).takes(1)
    monkeypatch.setattr(decoder, "MAX_GROUP", HEADS // KV_HEADS - 1)
    assert not made.takes(8)

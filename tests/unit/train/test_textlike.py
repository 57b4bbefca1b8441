"""The straight-through adaptor: its forward is a look-up, its gradient a softmax's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from narrows.retrieve.clsr import Pieces
from narrows.train.textlike import read_as_text, text_like
from tiny_speech import text_encoder

VOCABULARY, WIDTH = 7, 4
SPECIAL = torch.tensor([True, False, False, True, False, False, False])


def parts(rows=5, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    scores = torch.randn(rows, VOCABULARY, dtype=dtype, requires_grad=True)
    return scores, torch.randn(VOCABULARY, WIDTH, dtype=dtype)


def dense(scores, table, gamma, reading):
    """The definition with one-hot rows (sheet 3.4)."""
    scores = scores.masked_fill(SPECIAL, -math.inf)
    if reading == "probs":
        scores = scores.softmax(1).masked_fill(SPECIAL, -math.inf)
    soft = (scores / gamma).softmax(1)
    hard = torch.nn.functional.one_hot(scores.argmax(1), VOCABULARY).to(soft)
    return (hard + soft - soft.detach()) @ table


@pytest.mark.parametrize("reading", ["logits", "probs"])
@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_the_definition(reading, gamma):
    scores, table = parts()
    made = text_like(scores, table, SPECIAL, gamma=gamma, reading=reading)
    expected = dense(scores, table, gamma, reading)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)
    best = scores.masked_fill(SPECIAL, -math.inf).argmax(1)
    assert torch.equal(made, table[best])
    upstream = torch.randn_like(made)
    (mine,) = torch.autograd.grad(made, scores, upstream, retain_graph=True)
    (its,) = torch.autograd.grad(expected, scores, upstream)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-9)
    assert not mine[:, SPECIAL].any()
    assert mine[:, ~SPECIAL].any()


def test_backward_is_the_slope_of_the_softmax():
    scores, table = parts(3)
    usual = torch.zeros(VOCABULARY, dtype=torch.bool)
    upstream = torch.randn(3, WIDTH, dtype=torch.float64)

    def soft(z):
        return (z / 0.5).softmax(1) @ table

    assert gradcheck(soft, (scores,))
    (mine,) = torch.autograd.grad(text_like(scores, table, usual, gamma=0.5), scores, upstream)
    (its,) = torch.autograd.grad(soft(scores), scores, upstream)
    torch.testing.assert_close(mine, its)


def test_limits_of_gamma():
    scores, table = parts()
    upstream = torch.randn(5, WIDTH, dtype=torch.float64)

    def slope(gamma):
        made = text_like(scores, table, SPECIAL, gamma=gamma)
        return torch.autograd.grad(made, scores, upstream)[0]

    real = ~SPECIAL
    slopes = (upstream @ table.T)[:, real]
    even = (slopes - slopes.mean(1, keepdim=True)) / real.sum()
    torch.testing.assert_close(slope(1e6)[:, real] * 1e6, even, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        scores[:, 1] += 50.0
    assert slope(0.1).abs().max() < 1e-12


def test_probabilities_stay_soft():
    """The bound of the other reading: no piece can take more than e^(1/g)/(e^(1/g) + V - 1)."""
    gamma = 0.1
    scores = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    scores[0, 2] = 1e4
    probs = scores.softmax(1)
    most = float((probs / gamma).softmax(1).max())
    bound = math.exp(1 / gamma) / (math.exp(1 / gamma) + VOCABULARY - 1)
    assert most == pytest.approx(bound)
    assert most < 1
    scores.requires_grad_(True)
    table = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    assert text_like(scores, table, SPECIAL, reading="probs").requires_grad


def test_soft_mixes_all_but_special_pieces():
    scores, table = parts()
    made = text_like(scores, table, SPECIAL, adaptor="soft")
    chances = scores[:, ~SPECIAL].softmax(1)
    torch.testing.assert_close(made, chances @ table[~SPECIAL])


def test_ties_take_the_lowest_id():
    table = torch.eye(VOCABULARY)
    made = text_like(torch.zeros(1, VOCABULARY), table, SPECIAL)
    assert made[0].tolist() == table[1].tolist()


def test_forced_scores_read_as_the_text_does():
    encoder = text_encoder()
    pieces = Pieces.of(encoder)
    texts = ["the cat left", "a dog walked home at dawn", "captain"]
    ids = [encoder.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    flat = torch.tensor([i for own in ids for i in own])
    scores = torch.nn.functional.one_hot(flat, len(pieces.table)).float().requires_grad_(True)
    embeds = text_like(scores, pieces.table, pieces.special)
    vectors = read_as_text(embeds, [len(own) for own in ids], encoder)
    np.testing.assert_allclose(vectors.detach().numpy(), encoder.embed(texts), atol=1e-6)
    vectors[:, 0].sum().backward()
    assert scores.grad.any()
    assert all(p.grad is None for p in encoder.model.parameters())

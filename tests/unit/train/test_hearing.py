"""What the trainings of listening backends share: the contrastive loss, and what finds what."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from narrows.train.hearing import Counterparts, Questions, info_nce
from narrows.train.speech import Clip
from tiny_speech import text_encoder


def vectors(count, seed=0):
    torch.manual_seed(seed)
    return normalize(torch.randn(count, 5), dim=1), normalize(torch.randn(count, 5), dim=1)


def test_info_nce_by_hand():
    clips, questions = vectors(3)
    scores = (clips @ questions.T / 0.1).tolist()
    total = 0.0
    for i in range(3):
        row = sum(math.exp(s) for s in scores[i])
        column = sum(math.exp(scores[j][i]) for j in range(3))
        total -= math.log(math.exp(scores[i][i]) / row) + math.log(math.exp(scores[i][i]) / column)
    apart = torch.arange(3)
    loss = info_nce(clips, questions, apart, 0.1)
    assert float(loss) == pytest.approx(total / 6, rel=1e-5)
    torch.testing.assert_close(info_nce(questions, clips, apart, 0.1), loss)
    assert float(info_nce(clips[:1], questions[:1], apart[:1], 0.1)) == 0.0


def test_copies_of_a_clip_change_nothing():
    clips, questions = vectors(3)
    again = torch.tensor([0, 1, 2, 0, 0])
    one = info_nce(clips, questions, torch.arange(3), 0.1)
    many = info_nce(clips[again], questions[again], again, 0.1)
    torch.testing.assert_close(many, one)
    assert float(info_nce(*vectors(4), torch.zeros(4), 0.1)) == pytest.approx(0.0, abs=1e-6)


def test_more_questions_are_more_negatives():
    clips, questions = vectors(3)
    apart = torch.arange(3)
    more = vectors(6, seed=1)[1]
    with_more = info_nce(clips, questions, apart, 0.1, more)
    wide = cross_entropy(clips @ torch.cat([questions, more]).T / 0.1, apart)
    narrow = cross_entropy(questions @ clips.T / 0.1, apart)
    torch.testing.assert_close(with_more, (wide + narrow) / 2)


def test_counterparts_are_told_from_the_texts_of_other_groups():
    clips, own = vectors(3)
    texts = torch.cat([own, vectors(4, seed=1)[1]])
    groups = torch.tensor([0, 1, 2, 0, 1, 3, 3])
    apart = torch.tensor([0, 1])
    made = Counterparts(texts, groups, 0.1, "batch").contrast(clips[:2], [0, 4])
    torch.testing.assert_close(made, info_nce(clips[:2], texts[[0, 4]], apart, 0.1))
    made = Counterparts(texts, groups, 0.1, "all").contrast(clips[:2], [0, 4])
    told = info_nce(clips[:2], texts[[0, 4]], apart, 0.1, texts[[2, 5, 6]])
    torch.testing.assert_close(made, told)


def test_two_texts_of_a_clip_are_no_wrong_answers_and_share_its_weight():
    clips, texts = vectors(3)
    groups = torch.tensor([0, 0, 1])
    made = Counterparts(texts, groups, 0.1, "batch").contrast(clips[[0, 0, 2]], [0, 1, 2])
    total = 0.0
    for text, weight in ((0, 0.5), (1, 0.5)):  # of the clip with two texts
        right = float(clips[0] @ texts[text]) / 0.1
        wrong = float(clips[0] @ texts[2]) / 0.1
        total -= weight * (right - math.log(math.exp(right) + math.exp(wrong)))
        wrong = float(clips[2] @ texts[text]) / 0.1
        total -= weight * (right - math.log(math.exp(right) + math.exp(wrong)))
    right = float(clips[2] @ texts[2]) / 0.1
    wrongs = [float(clips[2] @ texts[t]) / 0.1 for t in (0, 1)]
    total -= right - math.log(math.exp(right) + sum(math.exp(w) / 2 for w in wrongs))
    wrong = float(clips[0] @ texts[2]) / 0.1
    total -= right - math.log(math.exp(right) + math.exp(wrong))
    assert float(made) == pytest.approx(total / 4, rel=1e-5)


def test_found_is_the_share_of_questions_whose_nearest_clip_is_theirs():
    asked = ["the cat left", "a storm", "the cat left", ""]
    questions = Questions([Clip("", "", "", one, True) for one in asked], text_encoder())
    assert questions.texts == ["a storm", "the cat left"]
    storm, cat = questions.vectors
    none = np.zeros_like(cat)
    assert questions.found(np.stack([cat, storm, none, none])) == 1.0
    assert questions.found(np.stack([none, storm, cat, none])) == 1.0  # one of its clips will do
    assert questions.found(np.stack([cat, none, none, storm])) == 0.5
    assert questions.found(np.stack([storm, cat, none, none])) == 0.0

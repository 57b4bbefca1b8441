"""Letters: the loss and the likeliest path against all ways to write them, and what they teach."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import ConfigError
from narrows.retrieve.cif import fire
from narrows.train.clsr import ClsrObjective, Goal, uneven
from narrows.train.letters import (
    ALPHABET,
    BLANK,
    LettersObjective,
    letter_loss,
    letter_spans,
    piece_ends,
)
from narrows.train.loop import LoopOptions, train
from tiny_speech import recogniser, speech, text_encoder


def written(path):
    """What a path says: of neighbours that are alike one is left, then blanks fall out."""
    return [place for place, _ in itertools.groupby(path) if place != BLANK]


def scored(seed, length):
    """Scores that make all but a, b and the blank impossible."""
    torch.manual_seed(seed)
    scores = torch.full((1, length, len(ALPHABET) + 1), -1e4)
    scores[:, :, [ALPHABET.index("a"), ALPHABET.index("b"), BLANK]] = torch.randn(1, length, 3)
    return scores, torch.ones(1, length, dtype=torch.bool)


@settings(max_examples=40, deadline=None)
@given(st.text("ab", min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 99))
def test_loss_and_likeliest_path_are_those_of_all_paths(word, length, seed):
    scores, mask = scored(seed, length)
    logs = scores[0].log_softmax(1).tolist()
    wanted = [ALPHABET.index(letter) for letter in word]
    paths = {
        path: sum(logs[t][place] for t, place in enumerate(path))
        for path in itertools.product({BLANK, *wanted}, repeat=length)
        if written(path) == wanted
    }
    (spans,) = letter_spans(scores, mask, [word])
    loss = float(letter_loss(scores, mask, [word]))
    if not paths:
        assert loss == 0.0
        assert spans == []
        return
    total = math.log(sum(map(math.exp, paths.values())))
    assert loss == pytest.approx(-total / len(word), rel=1e-4, abs=1e-4)
    best = max(paths, key=paths.__getitem__)
    runs = [(place, [*run]) for place, run in itertools.groupby(enumerate(best), lambda x: x[1])]
    assert spans == [(run[0][0], run[-1][0]) for place, run in runs if place != BLANK]


def test_neighbours_and_padding_have_no_part():
    one, other = scored(1, 6)[0], scored(2, 4)[0]
    padding = torch.full((1, 2, one.shape[2]), math.nan)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    scores = torch.cat([one, torch.cat([other, padding], 1)])
    words = ["aba", "b"]
    alone = [
        letter_spans(s, torch.ones(1, s.shape[1], dtype=torch.bool), [w])[0]
        for s, w in zip((one, other), words, strict=True)
    ]
    assert letter_spans(scores, mask, words) == alone
    clean = scores.nan_to_num(7.0)
    torch.testing.assert_close(
        letter_loss(clean, mask, words), letter_loss(scores.nan_to_num(0.0), mask, words)
    )


def test_pieces_end_halfway_to_the_next():
    spans = [(2, 3), (5, 5), (6, 7), (10, 11), (14, 14)]  # a b _ c d
    assert piece_ends(spans, "ab cd", ["a", "##b", "cd"], 20).tolist() == [5, 8, 20]
    assert not len(piece_ends(spans, "ab cd", ["[UNK]", "cd"], 20))


def test_weights_of_one_in_every_token_are_even():
    mask = torch.ones(1, 6, dtype=torch.bool)
    counts, ends = torch.tensor([2]), [torch.tensor([6, 12])]
    even = fire(torch.tensor([[0.5, 0.25, 0.25, 0.0, 1.0, 0.0]]), mask)
    assert float(uneven(even, counts, ends)) == 0.0
    late = fire(torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 0.5]]), mask)
    assert float(uneven(late, counts, ends)) == 1.0
    assert (
        float(uneven(late, counts, [torch.zeros(0, dtype=torch.long)])) == 0.0
    )  # the number is right


def test_letters_are_learnt_and_show_where_pieces_end(tmp_path):
    made = speech(24)
    module = recogniser(near=1)
    lesson = LettersObjective(module, made, batch=8)
    options = LoopOptions(steps=150, rate=1e-2, save_every=150)
    history = train(lesson.module, lesson.gradients, tmp_path, options, data="x")
    assert history[-1]["letters"] < history[0]["letters"] / 2
    assert lesson.score.weight.grad.any()
    assert set(module.state_dict()) == set(recogniser(near=1).state_dict())
    pieces = [clip.words.split() for clip in made.clips]
    ends = lesson.kept_ends(pieces, tmp_path / "ends.safetensors", "y")
    off = []
    for i, own in enumerate(ends):
        # A word is said for 6 to 8 states, see Made.
        stops = torch.tensor([6 + w % 3 for w in made.places(i)]).cumsum(0)
        off += (own - stops).abs().tolist()
        assert own[-1] == made.length(i)
    assert sum(off) / len(off) < 2.5
    again = lesson.kept_ends(pieces, tmp_path / "ends.safetensors", "y")
    assert all(torch.equal(a, b) for a, b in zip(again, ends, strict=True))


def test_quantity_is_counted_by_the_ends_that_are_known():
    module, made = recogniser(dropout=0.0), speech(4)
    none = [torch.zeros(0, dtype=torch.long)] * 4
    plain = ClsrObjective(module, text_encoder(), made, Goal(), batch=4)
    unknown = ClsrObjective(module, text_encoder(), made, Goal(), ends=none, batch=4)
    told, same = plain.gradients(0)["quantity"], unknown.gradients(0)["quantity"]
    assert same == pytest.approx(told, rel=1e-5)
    ends = [torch.arange(1, 5) * made.length(i) // 4 for i in range(4)]
    known = ClsrObjective(module, text_encoder(), made, Goal(), ends=ends, batch=4)
    assert known.gradients(0)["quantity"] >= told - 1e-6


def test_letters_need_convolutions():
    with pytest.raises(ConfigError, match="convolutions"):
        LettersObjective(recogniser(), speech())

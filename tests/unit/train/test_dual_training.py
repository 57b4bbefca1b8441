"""Training a dual encoder: who belongs to whom, and that it learns what it should."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from narrows.errors import ConfigError, InputError
from narrows.retrieve.clsr import Pieces
from narrows.retrieve.dual import DualEncoder
from narrows.retrieve.speech_head import padded
from narrows.train.dual import DualGoal, DualObjective, grouped, run
from narrows.train.hearing import draw, info_nce
from narrows.train.loop import CHECKPOINT, LoopOptions
from narrows.train.speech import Clip
from tiny_speech import STATE, Made, dual, speech, text_encoder

SIZES = {"state_size": STATE, "width": 32, "blocks": 1, "heads": 2, "inner": 64, "kernel": 3}


def told(*clips, **goal):
    """An objective over clips of words and questions."""
    made = Made([Clip(words, "", "", question, False) for words, question in clips])
    return DualObjective(dual(dropout=0.0), text_encoder(), made, DualGoal(**goal), batch=4)


# ------------------------------------------------------------------------------ who goes with whom


def test_texts_that_share_a_clip_are_of_one_group():
    found = grouped([["a", "b"], ["c"], ["d", "b"], [], ["e", "f"], ["c", "f"], ["g"]])
    parts = {}
    for text, group in found.items():
        parts.setdefault(group, set()).add(text)
    assert sorted(map(sorted, parts.values())) == [["a", "b", "d"], ["c", "e", "f"], ["g"]]


def test_a_clip_goes_with_its_question_and_its_words():
    made = told(("the cat left", "who left"), ("storm", ""), ("at dawn", "Who left"), ("", "ice"))
    assert made.usable == [0, 1, 2, 3]
    groups = {one: int(made.texts.groups[place]) for one, place in made.places.items()}
    assert list(groups) == ["who left", "the cat left", "storm", "Who left", "at dawn", "ice"]
    same = {"who left", "the cat left", "Who left", "at dawn"}  # the same question is asked twice
    assert len({groups[one] for one in same}) == 1
    assert len(set(groups.values())) == 3
    alone = told(("the cat left", "who left"), ("storm", ""), captions=False)
    assert alone.usable == [0]
    assert list(alone.places) == ["who left"]


def test_the_loss_is_of_every_text_of_every_clip():
    made = told(("the cat left", "who left"), ("storm", ""), negatives="batch")
    loss, _ = made.loss([0, 1])
    states, mask = padded([made.speech.states(i) for i in (0, 1)])
    with torch.autocast("cpu", torch.bfloat16):
        clips = made.module(states, mask)
    texts = torch.from_numpy(text_encoder().embed(["who left", "the cat left", "storm"]))
    right = info_nce(clips[[0, 0, 1]], texts, torch.tensor([0, 0, 1]), 0.05)
    torch.testing.assert_close(loss, right)


def test_the_words_of_a_clip_may_be_the_question_of_the_next():
    """Then they are told from neither."""
    made = told(("the cat left", ""), ("at dawn", "The cat left."))
    loss, _ = made.loss([0, 1])
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)


def test_what_cannot_be_learnt_from(tmp_path):
    with pytest.raises(InputError, match="no clip can be learnt from"):
        told(("the cat", ""), captions=False)
    with pytest.raises(ConfigError, match="negatives"):
        DualGoal(negatives="some")
    silent = Made([Clip("the cat", "", "", "", True)])
    options = LoopOptions(steps=1)
    with pytest.raises(InputError, match="no held-out clips with a question"):
        run(text_encoder(), speech(), silent, tmp_path, DualGoal(), options, **SIZES)


# --------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("captions", [True, False])
def test_it_learns_to_find_and_not_what_it_is_not_told(tmp_path, captions):
    """What clips teach holds for the same words in more noise; told the words of other clips, they
    teach that."""
    made = speech(32)
    fresh = Made(made.clips, noise=0.3)
    options = LoopOptions(steps=120, rate=1e-2, save_every=120)
    goal = DualGoal(captions=captions, temperature=0.02)

    def go(speech, folder):
        return run(text_encoder(), speech, fresh, folder, goal, options, batch=16, **SIZES)

    history = go(made, tmp_path / "a")
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert history[-1]["found"] > 0.8
    draw(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert not DualEncoder.load(tmp_path / "a", Pieces.of(text_encoder())).training
    words = [clip.words for clip in made.clips]
    others = Made([Clip(w, "", "", w, False) for w in words[1:] + words[:1]])
    others.states = made.states
    assert go(others, tmp_path / "b")[-1]["found"] < 0.1


def test_a_run_goes_on_as_if_never_stopped(tmp_path):
    def go(folder, stop=None):
        def on_step(step, row):
            if step == stop:
                raise KeyboardInterrupt

        options = LoopOptions(steps=6, save_every=3)
        run(
            text_encoder(), speech(), speech(4, seed=9), folder, DualGoal(), options,
            batch=4, on_step=on_step, **SIZES,
        )  # fmt: skip

    go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", 4)
    go(tmp_path / "cut")
    whole, cut = (load_file(tmp_path / f / "work/pairs" / CHECKPOINT) for f in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(value, cut[name])


def test_another_goal_is_not_gone_on_with(tmp_path):
    options = LoopOptions(steps=1)
    places = text_encoder(), speech(), speech(4, seed=9), tmp_path
    run(*places, DualGoal(), options, batch=4, **SIZES)
    with pytest.raises(InputError, match="trained on other data"):
        run(*places, DualGoal(captions=False), options, batch=4, **SIZES)

"""Training a recogniser: the sampler, the losses, and that it learns what it should."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from narrows.errors import ConfigError, InputError
from narrows.retrieve.clsr import embedded
from narrows.retrieve.speech_head import padded
from narrows.train.clsr import (
    ClsrObjective,
    Goal,
    HeldOut,
    edits,
    error_rate,
    piece_ids,
    run,
    sampled,
)
from narrows.train.hearing import draw
from narrows.train.loop import CHECKPOINT, LoopOptions, train
from narrows.train.speech import Clip
from tiny_speech import STATE, Made, recogniser, speech, text_encoder

STEADY = {"dropout": 0.0}


def objective(module, made=None, batch=4, **goal):
    return ClsrObjective(module, text_encoder(), made or speech(), Goal(**goal), batch=batch)


# --------------------------------------------------------------------------------- the sampler


def sample(wrong, counts, share, positions):
    embeds = torch.zeros(len(counts), max(counts) + 1, 2)
    marks = torch.arange(1.0, len(wrong) + 1)[:, None].expand(-1, 2)
    goal = Goal(sampling=share, positions=positions)
    return sampled(embeds, torch.tensor(counts), torch.tensor(wrong), marks, goal)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4), st.data())
def test_as_many_are_replaced_as_the_share_of_errors_says(items, data):
    share = data.draw(st.sampled_from([0.0, 0.2, 0.4, 0.75, 1.0]))
    positions = data.draw(st.sampled_from(["any", "errors"]))
    counts = [len(one) for one in items]
    flat = [wrong for one in items for wrong in one]
    made = sample(flat, counts, share, positions)
    marks = iter(range(1, len(flat) + 1))
    for row, one in zip(made, items, strict=True):
        own = torch.tensor([float(next(marks)) for _ in one])
        replaced = row[: len(one), 0] != 0
        assert int(replaced.sum()) == math.floor(share * sum(one) + 1e-6)
        assert torch.equal(row[: len(one), 0][replaced], own[replaced])
        assert not row[len(one) :].any()
        if positions == "errors":
            assert not replaced[~torch.tensor(one)].any()
            if share == 1.0:
                assert replaced.tolist() == one


def test_a_perfect_first_pass_is_left_alone():
    assert not sample([False] * 5, [2, 3], 1.0, "any").any()


def test_no_sampling_is_one_pass():
    module = recogniser(**STEADY).train()
    made = objective(module, sampling=0.0)
    loss, _ = made.loss([0, 1])
    states, mask = padded([made.speech.states(i) for i in (0, 1)])
    counts = torch.tensor([len(made.targets[i]) for i in (0, 1)])
    with torch.autocast("cpu", torch.bfloat16):
        frames, real = module.frames(states, mask)
        embeds, fired = module.fired(frames, real, counts)
        scores = module.scores(module.decode(embeds, counts, module.remember(frames, real)))
    told = cross_entropy(scores, torch.cat([made.targets[0], made.targets[1]]), label_smoothing=0.1)
    apart = (fired.totals - counts).abs().sum() / counts.sum()
    torch.testing.assert_close(loss, (1 - 1 / 3) * told + apart / 3)


# ---------------------------------------------------------------------------------- the losses


def test_the_length_loss_pulls_towards_the_target():
    module = recogniser(**STEADY)
    made = objective(module, quantity=1.0)
    slopes = []
    for bias in (-6.0, 3.0):
        with torch.no_grad():
            module.weigh.bias.fill_(bias)
        module.zero_grad()
        made.gradients(0)
        slopes.append(float(module.weigh.bias.grad))
        assert not any(p.grad.any() for p in module.blocks.parameters())
    assert slopes[0] < 0 < slopes[1]


def test_finding_alone_teaches_all_but_the_text_encoder():
    module = recogniser(**STEADY)
    objective(module, quantity=0.0, contrast=1.0, gamma=5.0).gradients(0)
    for part in (module.narrow, module.weigh_near, module.memory, module.blocks[0].query):
        assert part.weight.grad.any()
    assert all(p.grad is None for p in text_encoder().model.parameters())
    assert module.table.grad is None


def test_without_the_other_parts_it_is_plain_recognition(tmp_path):
    """The same parameters, bit for bit, as of a loop that knows of nothing else."""
    options = LoopOptions(steps=4, save_every=4)
    made = objective(recogniser(), quantity=0.0)
    train(made.module, made.gradients, tmp_path / "a", options, data="x")
    plain = recogniser()
    source = objective(plain, quantity=0.0)

    def gradients(step):
        torch.manual_seed(step)
        plain.train()
        chosen = source.chosen(step)
        states, mask = padded([source.speech.states(i) for i in chosen])
        counts = torch.tensor([len(source.targets[i]) for i in chosen])
        wanted = torch.cat([source.targets[i] for i in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            frames, real = plain.frames(states, mask)
            embeds, _ = plain.fired(frames, real, counts)
            memory = plain.remember(frames, real)
            with torch.no_grad():
                wrong = plain.scores(plain.decode(embeds, counts, memory)).argmax(1) != wanted
            embeds = sampled(embeds, counts, wrong, plain.table[wanted], source.goal)
            scores = plain.scores(plain.decode(embeds, counts, memory))
        loss = cross_entropy(scores, wanted, label_smoothing=0.1)
        loss.backward()
        return {"loss": float(loss.detach())}

    train(plain, gradients, tmp_path / "b", options, data="x")
    for one, other in zip(made.module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------ learning


def stages(steps=200, joint=0):
    told = [("recognition", Goal(), LoopOptions(steps=steps, rate=3e-3, save_every=steps))]
    if joint:
        goal = Goal(contrast=1 / 3, negatives="all")
        told.append(("joint", goal, LoopOptions(steps=joint, rate=1e-3, save_every=joint)))
    return told


SIZES = {"state_size": STATE, "blocks": 1, "heads": 2, "inner": 32, "kernel": 3}


def test_it_learns_what_it_is_told_and_not_what_it_is_not(tmp_path):
    """What 32 clips teach holds for others of the same words; told the words of other clips, they
    teach nothing of them."""
    made = speech(32)
    fresh = speech(16, seed=9)
    history = run(text_encoder(), made, fresh, tmp_path / "a", stages(150, 20), batch=16, **SIZES)
    assert [row["stage"] for row in history[149:151]] == ["recognition", "joint"]
    last = history[-1]
    assert last["piece_error"] < 0.2
    assert last["fired"] == pytest.approx(1.0, abs=0.1)
    assert last["found"] > 0.8
    assert history[149]["recognition"] < history[0]["recognition"] / 2
    draw(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    told = [clip.words for clip in made.clips]
    others = Made([Clip(w, "", "", w, False) for w in told[1:] + told[:1]])
    others.states = made.states
    control = run(text_encoder(), others, fresh, tmp_path / "b", stages(150), batch=16, **SIZES)
    assert control[-1]["found"] < 0.3
    assert control[-1]["piece_error"] > 0.6


def test_a_run_goes_on_as_if_never_stopped(tmp_path):
    def go(folder, steps):
        module = recogniser()
        made = objective(module, contrast=1 / 3)

        def gradients(step):
            if step == steps:
                raise KeyboardInterrupt
            return made.gradients(step)

        options = LoopOptions(steps=6, save_every=3)
        return train(module, gradients, folder, options, data="x")

    go(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", 4)
    go(tmp_path / "cut", None)
    whole, cut = (load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(value, cut[name])


def test_all_clips_are_read_equally_often_and_those_of_like_length_together():
    made = objective(recogniser(), batch=3)
    lengths = [30, 10, 31, 11, 32, 12, 33, 13]
    made.speech.length = lengths.__getitem__
    batches = [made.chosen(step) for step in range(8)]
    read = [i for batch in batches for i in batch]
    assert sorted(read) == sorted(3 * [*range(8)])
    assert [made.chosen(step) for step in range(8)] == batches
    rising = []
    for one, other in [*pairwise(batches)][::2]:  # two batches are a pool
        pool = sorted(one + other, key=made.speech.length)
        assert one + other in (pool, pool[3:] + pool[:3])
        rising.append(one + other == pool)
    assert len({*rising}) == 2


# ------------------------------------------------------------------------------------ measures


def test_edits():
    assert edits("kitten", "sitting") == 3
    assert edits("", "abc") == edits("abc", "") == 3
    assert error_rate([[1, 2], [3]], [[1, 4], [3, 5]]) == 0.5
    assert error_rate([], []) == 0.0


def test_held_out_counts_what_the_weights_fire():
    module = recogniser()
    told = HeldOut(module, text_encoder(), speech(6)).measure()
    with torch.no_grad():
        module.weigh.bias.fill_(-100.0)
    silent = HeldOut(module, text_encoder(), speech(6)).measure()
    assert silent["piece_error"] == silent["word_error"] == 1.0
    assert silent["fired"] == 0.0
    assert told["fired"] > 0


def test_mixtures_of_sure_pieces_are_the_pieces():
    module, held, text = recogniser(), speech(40), text_encoder()
    check = HeldOut(module, text, held)
    states = [held.states(i) for i in range(40)]
    unsure = check._mixed(states)
    with torch.no_grad():
        module.out_norm.weight.mul_(1e4)
        module.out_norm.bias.mul_(1e4)
    module.eval()
    heard = [one.ids for one in module.recognise(states)]
    chosen = embedded(heard, text)
    assert check._mixed(states) == pytest.approx(chosen, abs=1e-3)
    assert np.abs(unsure - chosen).max() > 0.01
    with torch.no_grad():
        module.weigh.bias.fill_(-100.0)
    assert not check._mixed(states).any()


def test_what_cannot_be_learnt_from():
    made = speech(3)
    made.clips = [Clip("the cat", "", "", "", False)] * 3
    with pytest.raises(InputError, match="no clip can be learnt from"):
        objective(recogniser(), made, contrast=0.3)
    with pytest.raises(ConfigError, match="must not exceed 1"):
        Goal(quantity=0.6, contrast=0.5)
    assert piece_ids("", text_encoder()) == []

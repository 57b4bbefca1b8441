"""Training a second pass: what is kept, that it goes on, and that it learns what drafts lack."""

from __future__ import annotations

import pytest
import torch

import tiny_speech
from narrows.errors import InputError, ModelError
from narrows.retrieve.deliberation import WEIGHTS
from narrows.train import clsr, deliberation
from narrows.train.deliberation import DeliberationObjective
from narrows.train.loop import CHECKPOINT, LoopOptions
from narrows.train.speech import Clip
from tiny_speech import Made, recogniser, speech, text_encoder

STEADY = {"dropout": 0.0}


def lesson(made=None, batch=4):
    return DeliberationObjective(
        tiny_speech.deliberation(),
        recogniser(**STEADY),
        text_encoder(),
        made or speech(),
        batch=batch,
    )


def test_drafts_are_those_of_each_clip_alone_and_are_kept(tmp_path):
    one = lesson()
    path = tmp_path / "drafts.safetensors"
    one.draft(path, "first")
    for i in one.usable:
        states = one.speech.states(i)[None].float()
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
        count = torch.tensor([len(one.targets[i])])
        with torch.no_grad():
            alone, _ = one.recogniser.draft(states, mask, count)
        for kept, own in zip(one._drafts[i], alone, strict=False):
            assert kept.dtype is torch.bfloat16
            assert torch.allclose(kept.float(), own[0], atol=0.1, rtol=0.05)
    other = lesson()
    other.recogniser = None  # not asked again
    other.draft(path, "first")
    assert torch.equal(other._drafts[0][0], one._drafts[0][0])
    with pytest.raises(InputError, match="another folder"):
        lesson().draft(path, "second")


def test_clips_without_words_or_of_unknown_signs_are_left_out():
    clips = [*speech(3).clips, Clip("", "", "", "", False), Clip("ø", "", "", "", False)]
    assert lesson(Made(clips)).usable == [0, 1, 2]


def test_it_learns_to_write_what_the_recogniser_cannot(tmp_path):
    """The recogniser is untrained: its drafts are hardly ever right."""
    made, held = speech(24), speech(6, seed=1)
    recogniser(**STEADY).save(tmp_path)

    def run(steps, **options):
        return deliberation.run(
            text_encoder(),
            made,
            held,
            tmp_path,
            LoopOptions(steps=steps, rate=2e-2, save_every=40),
            batch=8,
            decoder=tiny_speech.whisper_decoder(),
            rank=4,
            **options,
        )

    seen = []
    history = run(120, on_step=lambda step, told: seen.append(step))
    assert seen == list(range(120))
    first, last = history[0], history[-1]
    assert {row["stage"] for row in history} == {"deliberation"}
    assert last["second"] < 0.4 * first["second"]
    assert last["second_wrong"] < 0.5 * first["second_wrong"]
    # What is measured is what is used: by as many places as fire, which it does not change.
    before = clsr.HeldOut(recogniser(**STEADY), text_encoder(), held).measure()
    assert last["fired"] == before["fired"]
    assert last["piece_error"] != before["piece_error"]
    # Nothing is done again, and what is written is what was trained.
    assert len(run(120)) == 120
    work = tmp_path / "work" / "deliberation"
    assert sorted(p.name for p in work.iterdir()) == [
        CHECKPOINT,
        "drafts.safetensors",
        "history.jsonl",
    ]
    assert (tmp_path / WEIGHTS).exists()
    with pytest.raises(InputError, match="trained on other data"):
        run(160, seed=1)
    recogniser(seed=5, **STEADY).save(tmp_path)
    with pytest.raises(InputError, match="another folder"):
        run(160)


def test_it_needs_a_recogniser_and_clips_to_measure_on(tmp_path):
    options = LoopOptions(steps=1)
    with pytest.raises(InputError, match="no held-out clips"):
        deliberation.run(text_encoder(), speech(2), Made([]), tmp_path, options)
    with pytest.raises(ModelError, match="recogniser"):
        deliberation.run(text_encoder(), speech(2), speech(2), tmp_path, options)

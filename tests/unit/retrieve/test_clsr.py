"""The recogniser: padding and batches, what it saves, and its identity with text."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import tiny_speech
from narrows.errors import ConfigError, InputError, ModelError
from narrows.model.saved import CONFIG
from narrows.retrieve.clsr import WEIGHTS, Clsr, ClsrConfig, Heard, Pieces, Recogniser, padded
from tiny_speech import LETTERS, SPECIAL, STATE, WORDS, clips, embedder, recogniser, text_encoder

LENGTHS = [40, 7, 23, 1, 90, 8]
TEXTS = ["the cat left", "a dog walked home at dawn", "the captain", "ice"]


def ids_of(text):
    return text_encoder().tokenizer.encode(text, add_special_tokens=False)


def test_a_clip_is_heard_alike_whatever_its_neighbours():
    made = recogniser()
    states = clips(LENGTHS)
    together = made.recognise(states)
    assert any(len(one.ids) > 5 for one in together)
    for one, own in zip(together, states, strict=True):
        (alone,) = made.recognise([own])
        assert alone.ids == one.ids
        assert alone.times == one.times
        assert alone.sure == pytest.approx(one.sure, abs=1e-5)


def test_padding_is_never_read():
    made = recogniser()
    states, mask = padded(clips(LENGTHS))
    targets = torch.tensor([5, 2, 9, 1, 4, 3])

    def run(states):
        frames, real = made.frames(states, mask)
        embeds, fired = made.fired(frames, real, targets)
        embeds = embeds.masked_fill(embeds == 0, math.nan)  # rows behind an item's tokens
        return made.scores(made.decode(embeds, fired.counts, made.remember(frames, real)))

    clean = run(states)
    assert clean.shape == (int(targets.sum()), made.config.vocab_size)
    assert torch.equal(clean, run(states.masked_fill(~mask[:, :, None], math.nan)))
    assert clean.isfinite().all()


def test_times_sureness_and_special_pieces():
    made = recogniser()
    with torch.no_grad():
        made.bias[made.special] = 50.0  # would always win
    for one, states in zip(made.recognise(clips(LENGTHS)), clips(LENGTHS), strict=True):
        assert len(one.ids) == len(one.times) == len(one.sure)
        assert not made.special[one.ids].any()
        assert all(0 <= start < stop for start, stop in one.times)
        assert all(a[0] <= b[0] for a, b in zip(one.times, one.times[1:], strict=False))
        assert all(stop <= math.ceil(len(states) / 2) * 0.04 + 1e-9 for _, stop in one.times)
        assert all(0 < chance <= 1 for chance in one.sure)


def test_silence_is_nothing_heard():
    made = recogniser()
    with torch.no_grad():
        made.weigh.bias.fill_(-100.0)
    assert made.recognise(clips([30, 12])) == [Heard([], [], [])] * 2
    assert made.recognise([]) == []


def test_special_pieces_are_told_from_words():
    pieces = Pieces.of(text_encoder())
    assert pieces.special.tolist() == [True] * len(SPECIAL) + [False] * len(WORDS + LETTERS)


def test_saved_and_loaded(tmp_path):
    made = recogniser()
    made.save(tmp_path)
    pieces = Pieces.of(text_encoder())
    back = Recogniser.load(tmp_path, pieces)
    assert back.config == made.config
    assert not back.training
    for name, value in made.state_dict().items():
        assert torch.equal(value.bfloat16().float(), back.state_dict()[name])
    assert "table" not in made.state_dict()
    again = Recogniser.load(tmp_path, pieces).recognise(clips(LENGTHS))
    assert again == back.recognise(clips(LENGTHS))


def test_another_vocabulary_is_refused(tmp_path):
    recogniser().save(tmp_path)
    listed = [*SPECIAL, *WORDS, *LETTERS]
    listed[7], listed[8] = listed[8], listed[7]
    with pytest.raises(ModelError, match="word pieces of another text encoder"):
        Recogniser.load(tmp_path, Pieces.of(embedder(pieces=tuple(listed))))
    # Other weights behind the same pieces are welcome.
    Recogniser.load(tmp_path, Pieces.of(embedder(seed=5)))


def test_damaged_folders(tmp_path):
    pieces = Pieces.of(text_encoder())
    with pytest.raises(ModelError, match="cannot read a recogniser"):
        Recogniser.load(tmp_path, pieces)
    recogniser().save(tmp_path)
    told = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**told, "kernel": 5}))
    with pytest.raises(ModelError, match="do not belong"):
        Recogniser.load(tmp_path, pieces)
    (tmp_path / CONFIG).write_text(json.dumps({**told, "depth": 5}))
    with pytest.raises(ModelError, match="not a recogniser's: depth"):
        Recogniser.load(tmp_path, pieces)
    (tmp_path / CONFIG).write_text(json.dumps(told))
    (tmp_path / WEIGHTS).write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot read a recogniser"):
        Recogniser.load(tmp_path, pieces)


@pytest.mark.parametrize("changes", [{"heads": 5}, {"kernel": 4}, {"tail": "none"}])
def test_configs_that_cannot_be(changes):
    with pytest.raises(ConfigError):
        ClsrConfig(vocab_size=9, vocabulary="x", **changes)


# ------------------------------------------------------------------------- identity with text


def clsr():
    return Clsr(None, recogniser(), text_encoder())


def test_the_same_words_have_the_same_vector_heard_or_read():
    heard = [Heard(ids_of(text), [], []) for text in TEXTS]
    assert np.array_equal(clsr().embed(heard), text_encoder().embed(TEXTS))
    for text, one in zip(TEXTS, heard, strict=True):
        assert np.array_equal(clsr().embed([one]), text_encoder().embed([text]))
        assert clsr().written(one) == text


def test_stored_ids_embed_again_and_by_another_encoder():
    made = clsr()
    heard = made.recogniser.recognise(clips(LENGTHS))
    stored = [list(one.ids) for one in heard]
    assert np.array_equal(made.embed(heard), made.embed([Heard(ids, [], []) for ids in stored]))
    other = embedder(seed=9)
    swapped = Clsr(None, made.recogniser, other)
    fresh = swapped.embed(swapped.recogniser.recognise(clips(LENGTHS)))
    assert np.array_equal(fresh, swapped.embed(heard))
    assert not np.allclose(fresh, made.embed(heard))


def test_nothing_heard_is_no_direction():
    vectors = clsr().embed([Heard([], [], []), Heard(ids_of("ice"), [], [])])
    assert not vectors[0].any()
    assert np.linalg.norm(vectors[1]) == pytest.approx(1.0)


def test_what_the_encoder_would_not_read_is_refused():
    with pytest.raises(InputError, match="63 word pieces is longer than the 62"):
        text_encoder().embed_pieces([[9] * 63])
    assert text_encoder().embed_pieces([[9] * 62]).shape == (1, tiny_speech.WIDTH)


def test_state_sizes():
    assert recogniser().frames(*padded(clips([5, 6])))[0].shape == (2, 3, tiny_speech.WIDTH)
    assert clips([3])[0].shape == (3, STATE)

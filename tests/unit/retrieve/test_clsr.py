"""The recogniser: padding and batches, what it saves, and its identity with text."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny_speech
from narrows.errors import ConfigError, InputError, ModelError
from narrows.model.saved import CONFIG
from narrows.registry import build
from narrows.retrieve.audio import RATE
from narrows.retrieve.clips import LEAST_S
from narrows.retrieve.clsr import (
    WEIGHTS,
    WHOLE_PLACES,
    ClsrConfig,
    Pieces,
    Recogniser,
    Written,
    embedded,
    in_words,
)
from narrows.retrieve.clsr_backend import ClsrBackend
from narrows.retrieve.hearing import BACKENDS
from narrows.retrieve.speech_head import WHOLE, padded
from tiny_speech import LETTERS, SPECIAL, STATE, WORDS, clips, embedder, recogniser, text_encoder

LENGTHS = [40, 7, 23, 1, 90, 8]
TEXTS = ["the cat left", "a dog walked home at dawn", "the captain", "home"]


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
        assert np.array(alone.chances) == pytest.approx(np.array(one.chances), abs=1e-5)


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


def test_clips_of_all_lengths_are_heard_in_few_shapes(monkeypatch):
    made, seen = recogniser(), set()
    frames, decode = made.frames, made.decode

    def watched(states, mask):
        seen.add(("states", states.shape[1]))
        return frames(states, mask)

    def decoded(embeds, counts, memory):
        seen.add(("places", embeds.shape[1]))
        return decode(embeds, counts, memory)

    monkeypatch.setattr(made, "frames", watched)
    monkeypatch.setattr(made, "decode", decoded)
    for length in range(20, 140, 7):
        made.recognise(clips([length]))
    assert {size for kind, size in seen if kind == "states"} == {WHOLE, 2 * WHOLE, 3 * WHOLE}
    assert all(size % WHOLE_PLACES == 0 for kind, size in seen if kind == "places")


def test_times_sureness_and_special_pieces():
    made = recogniser()
    with torch.no_grad():
        made.bias[made.special] = 50.0  # would always win
    for one, states in zip(made.recognise(clips(LENGTHS)), clips(LENGTHS), strict=True):
        assert len(one.ids) == len(one.times) == len(one.chances)
        assert not made.special[one.ids].any()
        assert all(0 <= start < stop for start, stop in one.times)
        assert all(a[0] <= b[0] for a, b in zip(one.times, one.times[1:], strict=False))
        assert all(stop <= math.ceil(len(states) / 2) * 0.04 + 1e-9 for _, stop in one.times)
        assert all(0 < chance <= 1 for chances in one.chances for chance in chances)


def test_silence_is_nothing_heard():
    made = recogniser()
    with torch.no_grad():
        made.weigh.bias.fill_(-100.0)
    assert made.recognise(clips([30, 12])) == [Written([], [], [])] * 2
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
    with pytest.raises(ModelError, match="of another text encoder"):  # its table is the output
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


def test_the_same_words_have_the_same_vector_heard_or_read():
    heard = [ids_of(text) for text in TEXTS]
    assert np.array_equal(embedded(heard, text_encoder()), text_encoder().embed(TEXTS))
    for text, ids in zip(TEXTS, heard, strict=True):
        assert np.array_equal(embedded([ids], text_encoder()), text_encoder().embed([text]))
        assert in_words(ids, text_encoder()) == text


def backend(folder):
    """One whose speech encoder takes four samples for a state."""
    recogniser().save(folder)
    made = ClsrBackend(str(folder), passes="1")
    made.__dict__["embedder"] = text_encoder()
    made.__dict__["speech"] = SimpleNamespace(
        encode=lambda waves: [torch.from_numpy(w).view(-1, STATE) for w in waves]
    )
    return made


def waves():
    least = round(LEAST_S * RATE)
    return [clip.flatten().numpy() for clip in clips([least // STATE + n for n in (0, 9, 30)])]


def test_a_backend_stores_what_makes_its_vectors_again(tmp_path):
    made = backend(tmp_path)
    heard = made.hear(waves())
    stored = [one.tokens.tolist() for one in heard]
    assert all(stored)
    assert stored == [one.ids for one in made.write(waves())]
    assert np.array_equal(np.stack([h.vector for h in heard]), embedded(stored, text_encoder()))
    assert [one.text for one in heard] == [in_words(ids, text_encoder()) for ids in stored]
    assert heard[0].tokens.dtype == np.int32
    # Another encoder of the same pieces needs no sound.
    other = embedder(seed=9)
    read = other.embed([one.text for one in heard])
    assert np.array_equal(embedded([ids_of(one.text) for one in heard], other), read)
    question = made.embed("the cat left")
    assert np.array_equal(question, text_encoder().embed(["the cat left"])[0])
    with pytest.raises(InputError, match="question is empty"):
        made.embed(" ")


def test_a_backend_is_known_by_name_and_hears_nothing_in_next_to_nothing(tmp_path):
    made = build(BACKENDS, f"clsr:folder={tmp_path}")
    with pytest.raises(ModelError, match="cannot read a recogniser"):
        made.hear(waves())
    (empty,) = backend(tmp_path).hear([np.zeros(5, np.float32)])
    assert empty.text == ""
    assert len(empty.tokens) == 0
    assert not empty.vector.any()


def test_nothing_heard_is_no_direction():
    vectors = embedded([[], ids_of("home")], text_encoder())
    assert not vectors[0].any()
    assert np.linalg.norm(vectors[1]) == pytest.approx(1.0)


def test_what_the_encoder_would_not_read_is_refused():
    with pytest.raises(InputError, match="63 word pieces is longer than the 62"):
        text_encoder().embed_pieces([[9] * 63])
    read = text_encoder().embed_pieces([[9] * 62])
    assert np.array_equal(embedded([[9] * 63], text_encoder()), read)


def test_state_sizes():
    assert recogniser().frames(*padded(clips([5, 6])))[0].shape == (2, 3, tiny_speech.WIDTH)
    assert clips([3])[0].shape == (3, STATE)

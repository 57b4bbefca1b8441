"""The dual encoder: padding and batches, what it saves, and searching what it hears."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from narrows.errors import ConfigError, InputError, ModelError
from narrows.model.saved import CONFIG
from narrows.registry import build
from narrows.retrieve.audio import RATE
from narrows.retrieve.clips import LEAST_S
from narrows.retrieve.clsr import Pieces
from narrows.retrieve.dual import WEIGHTS, DualBackend, DualConfig, DualEncoder
from narrows.retrieve.hearing import BACKENDS
from narrows.retrieve.speech_head import padded
from narrows.retrieve.speech_index import Origin, Recording, SpeechIndex
from narrows.retrieve.speech_search import SpeechSearch
from tiny_speech import STATE, WIDTH, clips, dual, embedder, text_encoder

LENGTHS = [40, 7, 23, 1, 90, 8]


def test_a_clip_has_its_vector_whatever_its_neighbours():
    made = dual()
    states = clips(LENGTHS)
    together = made.encode(states)
    assert together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(1.0, abs=1e-5)
    for vector, own in zip(together, states, strict=True):
        assert made.encode([own])[0] == pytest.approx(vector, abs=1e-5)
    assert abs(together[0] - together[4]).max() > 0.01
    assert made.encode([]).shape == (0, WIDTH)


@pytest.mark.parametrize("training", [False, True])
def test_padding_is_never_read(training):
    made = dual(dropout=0.0).train(training)
    states, mask = padded(clips(LENGTHS))
    clean = made(states, mask)
    assert torch.equal(clean, made(states.masked_fill(~mask[:, :, None], math.nan), mask))
    assert clean.isfinite().all()


def test_what_comes_first_matters():
    """Frames are no bag: turned round, a clip has another vector."""
    (states,) = clips([40])
    made = dual()
    there, back = made.encode([states, states.flip(0)])
    assert abs(there - back).max() > 1e-3


def test_every_parameter_learns():
    made = dual().train()
    vectors = made(*padded(clips(LENGTHS)))
    (vectors * torch.randn(vectors.shape)).sum().backward()
    for name, weight in made.named_parameters():
        # The middle third is the bias of keys, which adds the same to the scores of all frames.
        slopes = weight.grad.chunk(3)[::2] if name.endswith("in_proj_bias") else [weight.grad]
        assert all(slope.abs().max() > 1e-7 for slope in slopes), name


def test_saved_and_loaded(tmp_path):
    made = dual()
    made.save(tmp_path)
    back = DualEncoder.load(tmp_path, Pieces.of(text_encoder()))
    assert back.config == made.config
    assert not back.training
    for name, value in made.state_dict().items():
        assert torch.equal(value.bfloat16().float(), back.state_dict()[name])
    again = DualEncoder.load(tmp_path, Pieces.of(text_encoder()))
    assert np.array_equal(again.encode(clips(LENGTHS)), back.encode(clips(LENGTHS)))


def test_another_text_encoder_is_refused(tmp_path):
    dual().save(tmp_path)
    with pytest.raises(ModelError, match="trained for another text encoder"):
        DualEncoder.load(tmp_path, Pieces.of(embedder(seed=5)))
    with pytest.raises(ConfigError, match="trained for another text encoder"):
        dual(text_width=WIDTH + 1)


def test_damaged_folders(tmp_path):
    pieces = Pieces.of(text_encoder())
    with pytest.raises(ModelError, match="cannot read a dual encoder"):
        DualEncoder.load(tmp_path, pieces)
    dual().save(tmp_path)
    told = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**told, "blocks": 1}))
    with pytest.raises(ModelError, match="do not belong"):
        DualEncoder.load(tmp_path, pieces)
    (tmp_path / CONFIG).write_text(json.dumps({**told, "tail": "zero_frame"}))
    with pytest.raises(ModelError, match="not a dual encoder's: tail"):
        DualEncoder.load(tmp_path, pieces)
    (tmp_path / CONFIG).write_text(json.dumps(told))
    (tmp_path / WEIGHTS).write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot read a dual encoder"):
        DualEncoder.load(tmp_path, pieces)


@pytest.mark.parametrize("changes", [{"heads": 5}, {"kernel": 4}, {"text_width": 0}])
def test_configs_that_cannot_be(changes):
    with pytest.raises(ConfigError):
        DualConfig(**{"vocabulary": "x", "text_width": 9, **changes})


# ---------------------------------------------------------------------------------- the backend


def backend(folder):
    """One whose speech encoder takes as many samples for a state as it has numbers."""
    dual().save(folder)
    made = build(BACKENDS, f"dual:folder={folder}")
    made.__dict__["embedder"] = text_encoder()
    made.__dict__["speech"] = SimpleNamespace(
        encode=lambda waves: [torch.from_numpy(w).view(-1, STATE) for w in waves]
    )
    return made


def waves():
    least = round(LEAST_S * RATE)
    return [clip.flatten().numpy() for clip in clips([least // STATE + n for n in (0, 9, 30)])]


def test_a_backend_has_vectors_and_no_words(tmp_path):
    made = backend(tmp_path)
    assert isinstance(made, DualBackend)
    assert not made.verbatim
    short = np.zeros(round(LEAST_S * RATE) - 1, np.float32)
    first, nothing, *rest = made.hear([waves()[0], short, *waves()[1:]])
    for heard, states in zip([first, *rest], waves(), strict=True):
        assert heard.text == ""
        assert (heard.tokens.dtype, len(heard.tokens)) == (np.int32, 0)
        (alone,) = made.encoder.encode([torch.from_numpy(states).view(-1, STATE)])
        assert heard.vector == pytest.approx(alone, abs=1e-5)
    assert not nothing.vector.any()
    (nothing,) = made.hear([short])
    assert nothing.vector.shape == (WIDTH,)
    assert np.array_equal(made.embed("the cat left"), text_encoder().embed(["the cat left"])[0])
    with pytest.raises(InputError, match="question is empty"):
        made.embed(" ")


def test_a_missing_dual_encoder_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot read a dual encoder"):
        build(BACKENDS, f"dual:folder={tmp_path}").hear(waves())


def test_what_has_no_words_is_found_by_its_vector(tmp_path):
    made = backend(tmp_path / "dual")
    heard = made.hear([*waves(), np.zeros(5, np.float32)])
    index = SpeechIndex.create(tmp_path / "index", Origin("dual", "ear", "mind"))
    times = np.array([[i, i + 1.0] for i in range(len(heard))])
    index.add(Recording("d" * 64, "talk.wav", 4.0, times, heard))
    search = SpeechSearch([*SpeechIndex.open(tmp_path / "index").recordings()])
    assert len(search) == 3  # of the last clip there is nothing to find
    vectors = np.stack([one.vector for one in heard[:3]])
    for asked in ("the cat left", "storm", "?"):
        question = made.embed(asked)
        best = np.argsort(-(vectors @ question))
        for mode in ("vectors", "fused"):
            hits = search.search(asked, question, 5, mode=mode)
            assert [hit.clip for hit in hits] == best.tolist()
            assert all(math.isfinite(hit.score) and hit.text == "" for hit in hits)
        assert search.search(asked, question, 5, mode="words") == []

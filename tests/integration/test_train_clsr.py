"""Training what hears from the command line, then listening with it."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest

import tiny_hearing
from narrows import cli
from narrows.errors import ConfigError, ModelError
from narrows.registry import build
from narrows.retrieve.audio import RATE
from narrows.retrieve.hearing import BACKENDS
from narrows.retrieve.speech_encoder import SpeechEncoder
from narrows.train.speech import ESPEAK, FLITE, speak
from tiny_speech import spoken_data

SMALL = ["--clips=6", "--held=3", "--batch=2", "--blocks=1", "--save-every=2", "--device=cpu"]


def train(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["narrows", "train", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.model
def test_a_recogniser_and_a_dual_encoder_from_the_command_line(tmp_path, monkeypatch, capfd):
    if not (shutil.which(FLITE) and shutil.which(ESPEAK)):
        pytest.skip("flite or espeak-ng is not installed")
    try:
        SpeechEncoder.load()
    except ModelError as error:
        pytest.skip(str(error))
    data, out = spoken_data(tmp_path / "data"), tmp_path / "out"
    places = ("clsr", "--out", str(out), "--data", str(data), *SMALL, "--letter-steps", "2")
    for refused, told in ((("--near", "0"), "--near 1"), (("--near=-1",), "near")):
        assert train(monkeypatch, *places, *refused) == 2
        assert told in capfd.readouterr().err
        assert not out.exists()
    assert train(monkeypatch, *places, "--steps", "2", "--joint-steps", "1") == 0
    assert "of questions find their clip among 3" in capfd.readouterr().out
    assert (out / "curves.png").stat().st_size > 1000
    # Another goal is not gone on with.
    assert train(monkeypatch, *places, "--steps", "4", "--sampling", "0.1") == 2
    assert "trained on other data" in capfd.readouterr().err
    backend = build(BACKENDS, f"clsr:folder={out}")
    wave = speak("the harbour is very old", (FLITE, "rms"))
    heard, nothing = backend.hear([wave, np.zeros(RATE // 100, np.float32)])
    assert heard.vector.shape == backend.embed("How old is the harbour?").shape == (384,)
    assert nothing.text == ""
    assert backend.hears.startswith("whisper-base ")
    # A dual encoder learns from the same speech.
    other = tmp_path / "dual"
    places = ("dual", "--out", str(other), "--data", str(data), "--speech", str(out), *SMALL)
    assert train(monkeypatch, *places, "--steps", "2") == 0
    assert "of questions find their clip among 3" in capfd.readouterr().out
    assert sorted(path.name for path in (other / "work").iterdir()) == ["pairs"]
    assert train(monkeypatch, *places, "--steps", "2", "--clips", "5") == 2
    assert "made from other texts" in capfd.readouterr().err
    assert train(monkeypatch, *places, "--steps", "2", "--speech", str(data)) == 2
    assert "holds no speech" in capfd.readouterr().err
    backend = build(BACKENDS, f"dual:folder={other}")
    heard, nothing = backend.hear([wave, np.zeros(RATE // 100, np.float32)])
    assert heard.vector.shape == backend.embed("How old is the harbour?").shape == (384,)
    assert heard.vector.any()
    assert not nothing.vector.any()
    assert " dual " in backend.hears
    # Another speech encoder, which has no decoder for a second pass.
    encoder, third = tiny_hearing.wav2vec2(tmp_path / "encoder"), tmp_path / "third"
    places = ("clsr", "--out", str(third), "--data", str(data), *SMALL, "--letter-steps", "0")
    places = (*places, "--steps", "1", "--joint-steps", "1", "--speech-encoder", str(encoder))
    assert train(monkeypatch, *places) == 0
    with pytest.raises(ConfigError, match="give passes=1"):
        build(BACKENDS, f"clsr:folder={third}").hear([wave])
    backend = build(BACKENDS, f"clsr:folder={third},passes=1")
    assert backend.hear([wave])[0].vector.shape == (384,)
    assert backend.hears.startswith(f"{encoder} ")
    places = ("dual", "--out", str(tmp_path / "fourth"), "--data", str(data), *SMALL)
    places = (*places, "--steps", "1", "--speech", str(third), "--speech-encoder", str(encoder))
    assert train(monkeypatch, *places) == 0
    heard = build(BACKENDS, f"dual:folder={tmp_path / 'fourth'}").hear([wave])
    assert heard[0].vector.any()

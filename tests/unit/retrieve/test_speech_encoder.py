"""States of clips: the convention for short ones, and clips that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    BertModel,
    Wav2Vec2FeatureExtractor,
)

import tiny_hearing
from narrows.errors import InputError, ModelError
from narrows.retrieve.audio import RATE
from narrows.retrieve.speech_encoder import CODE_LIMIT, SpeechEncoder


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("ctranslate2")
    try:
        return SpeechEncoder.load()
    except ModelError as error:
        pytest.skip(str(error))


def tone(seconds):
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * 220 * time * (1 + time))).astype(np.float32)


@pytest.mark.model
@pytest.mark.parametrize("seconds", [1 / RATE, 0.01, 0.5, 1.01, 30.0])
def test_a_state_every_20_ms(encoder, seconds):
    (states,) = encoder.encode([tone(seconds)])
    assert states.dtype == torch.float32
    assert states.shape[1] == 512
    assert abs(len(states) - seconds / 0.02) <= 1
    assert states.isfinite().all()


@pytest.mark.model
def test_repeatable_and_not_filled_up(encoder):
    wave = tone(2.0)
    (states,) = encoder.encode([wave])
    filled, again = encoder.encode([np.pad(wave, (0, 5 * RATE)), wave])
    assert torch.equal(states, again)
    assert not torch.allclose(states, filled[: len(states)], atol=0.1)


@pytest.mark.model
def test_clips_that_cannot_be_encoded(encoder):
    with pytest.raises(InputError, match=r"0\.00 s"):
        encoder.encode([tone(1.0), tone(0)])
    with pytest.raises(InputError, match="at most 30 s"):
        encoder.encode([tone(30.1)])
    wave = tone(0.2)
    wave[7] = np.nan
    with pytest.raises(InputError, match="not finite"):
        encoder.encode([wave])
    assert encoder.encode([np.zeros(RATE, np.float32)])[0].isfinite().all()
    assert encoder.encode([]) == []


@pytest.mark.parametrize(
    ("make", "size"), [(tiny_hearing.whisper, 16), (tiny_hearing.wav2vec2, 12)]
)
def test_encoders_of_transformers(make, size, tmp_path):
    encoder = SpeechEncoder.load(str(make(tmp_path)), device="cpu")
    assert (encoder.name, encoder.state_size) == (str(tmp_path), size)
    assert encoder.state_seconds == 0.02
    lengths = [1 / RATE, 0.01, 0.5, 1.01, 30.0]
    together = encoder.encode([tone(seconds) for seconds in lengths])
    for seconds, states in zip(lengths, together, strict=True):
        assert states.dtype == torch.float32
        assert abs(len(states) - seconds / 0.02) <= 1
        assert torch.equal(states, encoder.encode([tone(seconds)])[0])
    model = (AutoModelForSpeechSeq2Seq if size == 16 else AutoModel).from_pretrained(tmp_path)
    features = AutoFeatureExtractor.from_pretrained(tmp_path)
    with torch.no_grad():
        inner = model.eval().get_encoder() if size == 16 else model.eval()
        given = features(tone(0.5), sampling_rate=RATE, return_tensors="pt")
        states = inner(**given).last_hidden_state[0]
    assert torch.allclose(together[2], states[: len(together[2])], atol=1e-5)
    with pytest.raises(InputError, match="at most 30 s"):
        encoder.encode([tone(30.1)])


def test_models_that_are_no_speech_encoders(tmp_path):
    tiny_hearing.whisper(tmp_path)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is of the kind bert: give a Whisper or a wav2vec2-style"):
        SpeechEncoder.load(str(tmp_path))
    tiny_hearing.wav2vec2(tmp_path)
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="hears 8000 samples a second, not 16000"):
        SpeechEncoder.load(str(tmp_path))


def test_a_folder_without_whisper(tmp_path):
    pytest.importorskip("ctranslate2")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        SpeechEncoder.load(str(tmp_path))


GROWTH = """
import os
import subprocess
import sys

import numpy as np
from pathlib import Path
from narrows.retrieve.speech_encoder import SpeechEncoder

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

encoder = SpeechEncoder.load()
encoder.encode([np.zeros(7 * 16000, np.float32)])
before = resident()
for tenths in range(30, 70):
    encoder.encode([np.zeros(tenths * 1600, np.float32)])
print(resident() - before)
"""


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="reads what is resident from /proc")
def test_memory_does_not_grow_with_the_lengths_met(encoder):
    """Forty lengths leave less behind than with as much code kept as oneDNN would."""

    def growth(**limit):
        found = subprocess.run(
            [sys.executable, "-c", GROWTH], env=os.environ | limit, capture_output=True, check=True
        )
        return float(found.stdout)

    assert CODE_LIMIT not in os.environ
    assert growth() < growth(**{CODE_LIMIT: "1024"}) / 2

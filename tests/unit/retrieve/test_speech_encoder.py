"""States of clips: the convention for short ones, and clips that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

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

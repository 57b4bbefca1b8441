"""Sound for tests: tones, files of any kind, and a synthetic voice where there is one."""

from __future__ import annotations

import shutil
import subprocess
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from narrows.retrieve.voice import FRAME

CODECS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "ogg": "libopus",
    "m4a": "aac",
    "webm": "libopus",
}


def tone(seconds: float, hertz: float = 440.0, rate: int = 16_000) -> NDArray[np.float32]:
    """Half as loud as can be."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def loud(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """A detector for tests: speech is what is loud, and each frame says how loud it is."""
    return np.abs(wave).reshape(-1, FRAME).max(1)


def write_wav(path: Path, samples: NDArray[np.float32], rate: int = 16_000, width: int = 2) -> Path:
    """``samples`` ``[n]`` or ``[n, channels]`` as PCM of ``width`` bytes."""
    channels = samples if samples.ndim == 2 else samples[:, None]
    ints = np.round(channels.astype(np.float64) * (2 ** (8 * width - 1) - 1)).astype("<i4")
    if width == 1:
        ints = ints + 128
    data = ints.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


def write_float_wav(path: Path, samples: NDArray[np.float32], rate: int = 16_000) -> Path:
    return encode(path, samples, rate, codec="pcm_f32le", container="wav")


def encode(
    path: Path,
    samples: NDArray[np.float32],
    rate: int,
    *,
    codec: str = "",
    container: str | None = None,
) -> Path:
    """Mono ``samples`` as the kind of file that the name says, or ``container``."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec or CODECS[path.suffix[1:]], rate=rate, layout="mono")
        resampler = av.AudioResampler(
            format=stream.format.name,
            layout="mono",
            rate=rate,
            frame_size=stream.frame_size or 1024,
        )
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        frame.time_base = Fraction(1, rate)
        for made in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(stream.encode(made))
        out.mux(stream.encode(None))
    return path


def speak(path: Path, text: str) -> Path:
    """``text`` spoken by flite into a WAV, or a skip with the reason."""
    if shutil.which("flite") is None:
        pytest.skip("no flite to speak with (Debian package flite)")
    subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", str(path)], check=True)
    return path

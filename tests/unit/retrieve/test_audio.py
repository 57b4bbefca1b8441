"""Sound in: every kind of file comes out as the same 16 kHz mono, or as one clear error."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import InputError
from narrows.retrieve.audio import RATE, read_audio, read_spans, seconds_of
from narrows.retrieve.audio import write_wav as write_sound
from tiny_sound import CODECS, encode, tone, write_float_wav, write_wav


def whole(path: Path) -> np.ndarray:
    blocks = list(read_audio(path))
    assert all(block.dtype == np.float32 and block.ndim == 1 for block in blocks)
    return np.concatenate(blocks)


def loudness(wave: np.ndarray, hertz: float) -> float:
    """Amplitude of one frequency, away from the ends."""
    middle = wave[1600:-1600]
    turn = np.exp(-2j * np.pi * hertz * np.arange(len(middle)) / RATE)
    return float(2 * abs(np.mean(middle * turn)))


@pytest.mark.parametrize("suffix", CODECS)
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    rate = 48_000
    path = encode(tmp_path / f"a.{suffix}", tone(2.5, 440, rate), rate)
    wave = whole(path)
    assert len(wave) / RATE == pytest.approx(2.5, abs=0.06)
    assert loudness(wave, 440) == pytest.approx(0.5, abs=0.03)
    assert seconds_of(path) == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 96_000, 192_000])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_rate_and_width(tmp_path: Path, rate: int, width: int) -> None:
    wave = whole(write_wav(tmp_path / "a.wav", tone(1.2, 300, rate), rate, width))
    assert abs(len(wave) - 1.2 * RATE) < 40
    assert loudness(wave, 300) == pytest.approx(0.5, abs=0.01)


def test_what_16_khz_cannot_hold_is_left_out(tmp_path: Path) -> None:
    wave = whole(write_wav(tmp_path / "a.wav", tone(1, 11_000, 44_100), 44_100))
    assert np.abs(wave[800:-800]).max() < 0.005


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    one = tone(1)
    samples = np.zeros((len(one), channels), np.float32)
    samples[:, -1] = one
    wave = whole(write_wav(tmp_path / "a.wav", samples))
    np.testing.assert_allclose(wave, one / channels, atol=1e-4)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.flac", tone(1), RATE)
    np.testing.assert_array_equal(whole(source), whole(source.rename(tmp_path / "b.mp3")))


def test_a_long_file_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.tile(tone(10, rate=8_000), 30), 8_000, 1)
    next(read_audio(path))  # imports
    tracemalloc.start()
    sizes = [len(block) for block in read_audio(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(sum(sizes) - 300 * RATE) < 100
    assert max(sizes) < 1.5 * RATE
    assert peak < 4 * 4 * RATE  # of 300 seconds, some four


@given(spans=st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3)), max_size=4))
def test_spans_are_cuts_of_the_whole(spans: list[tuple[float, float]], long_file: Path) -> None:
    wave = whole(long_file)
    for (start, end), found in zip(spans, read_spans(long_file, spans), strict=True):
        np.testing.assert_array_equal(found, wave[round(start * RATE) : round(end * RATE)])


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wav(tmp_path_factory.mktemp("sound") / "a.wav", tone(3.5, 100, 22_050), 22_050)


# ------------------------------------------------------------------------------- what is no sound


def complaint(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        whole(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize(
    "data",
    [
        b"Call me Ishmael. " * 300,
        bytes(range(256)) * 40,
        b"\x89PNG\r\n\x1a\n" + bytes(2000),
        b"#EXTM3U\n/etc/hostname\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
    ],
    ids=["text", "bytes", "picture", "play list", "list of files"],
)
def test_what_is_no_sound_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    assert "is no sound that can be read" in complaint(path)


def test_empty_missing_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    assert "cannot be read (No such file or directory)" in complaint(path)
    assert "is a directory" in complaint(tmp_path)
    path.touch()
    assert "is empty" in complaint(path)
    assert "holds no sound" in complaint(write_wav(path, np.zeros(0, np.float32)))


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a", "webm"])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    path = encode(tmp_path / f"a.{suffix}", tone(4), RATE if suffix != "webm" else 48_000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "cut short" in complaint(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    samples = tone(3)
    samples[2 * RATE] = bad
    path = write_float_wav(tmp_path / "a.wav", samples)
    assert "no numbers" in complaint(path)


def test_a_wav_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(2))
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(whole(path)) == 2 * RATE


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['av'] = None; from narrows.retrieve.audio import read_audio\n"
        "try: list(read_audio('a.wav'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "ConfigError reading sound needs av: pip install 'narrows[listen]'\n"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_sound(path, 3 * tone(1))
    np.testing.assert_allclose(whole(path), np.clip(3 * tone(1), -1, 1), atol=1e-4)


@pytest.mark.data
def test_digits_said_over_the_telephone(data_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(data_folder / "fsdd" / "recordings.tar.gz") as archive:
        members = [m for m in archive.getmembers() if m.name.endswith(".wav")][:5]
        archive.extractall(tmp_path, members, filter="data")
    for member in members:
        with wave.open(str(tmp_path / member.name)) as file:
            seconds = file.getnframes() / file.getframerate()
            assert file.getframerate() == 8_000
        assert len(whole(tmp_path / member.name)) / RATE == pytest.approx(seconds, abs=0.01)


@pytest.mark.data
def test_recordings_of_people(data_folder: Path) -> None:
    paths = sorted((data_folder / "ljspeech").glob("*.flac"))[:3]
    for path in paths:
        wave = whole(path)
        assert len(wave) / RATE == pytest.approx(seconds_of(path), abs=0.01)
        assert 0.05 < np.abs(wave).max() <= 1.01


def film(path: Path, sound_s: float, pictures_s: float) -> Path:
    """A film whose pictures go on longer than its sound."""
    import av

    with av.open(str(path), "w") as file:
        pictures = file.add_stream("mpeg4", rate=10)
        pictures.width = pictures.height = 32
        pictures.pix_fmt = "yuv420p"
        sound = file.add_stream("aac", rate=RATE, layout="mono")
        for _ in range(round(pictures_s * 10)):
            black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            file.mux(pictures.encode(black))
        made = av.AudioFrame.from_ndarray(tone(sound_s)[None], format="fltp", layout="mono")
        made.sample_rate = RATE
        file.mux([*sound.encode(made), *sound.encode(None), *pictures.encode(None)])
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_sound_of_a_film_is_as_long_as_it_is(tmp_path: Path, suffix: str) -> None:
    assert len(whole(film(tmp_path / f"film.{suffix}", 2.0, 4.0))) / RATE == pytest.approx(
        2, abs=0.2
    )


def test_a_tag_in_an_old_alphabet(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "old.wav", tone(1))
    tag = b"INFOIART" + (6).to_bytes(4, "little") + b"Caf\xe9\0\0"
    data = path.read_bytes() + b"LIST" + len(tag).to_bytes(4, "little") + tag
    path.write_bytes(data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:])
    assert len(whole(path)) == RATE
    assert seconds_of(path) == pytest.approx(1)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"echo sound > {tmp_path / 'pipe'}"])
    with pytest.raises(InputError, match="save it first"):
        whole(tmp_path / "pipe")
    writer.wait()

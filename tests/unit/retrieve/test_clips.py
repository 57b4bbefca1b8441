"""Clips: every spoken moment in one of them, none too long, nothing held but the one at hand."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import ConfigError
from narrows.retrieve.audio import RATE, Wave, read_audio
from narrows.retrieve.clips import LEAST_S, LONGEST_S, PAUSE_S, WANTED_S, Clip, cut
from narrows.retrieve.voice import FRAME, Silero
from tiny_sound import loud, speak, tone

FRAME_S = FRAME / RATE


def sound(*pieces: tuple[float, float]) -> Wave:
    """Loudness and seconds of each piece."""
    return np.concatenate([np.full(round(s * RATE), level, np.float32) for level, s in pieces])


def cut_whole(wave: Wave, **options: float) -> list[Clip]:
    return list(cut([wave], loud, **options))


def bounds(clips: list[Clip]) -> list[tuple[float, float]]:
    return [(round(clip.start, 2), round(clip.end, 2)) for clip in clips]


runs = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.9]), st.integers(1, 500)), max_size=12
)


@settings(max_examples=60)
@given(runs=runs, tail=st.integers(0, FRAME - 1), seed=st.integers(0, 99))
def test_all_speech_is_in_one_clip(runs: list[tuple[float, int]], tail: int, seed: int) -> None:
    levels = np.array([level for level, count in runs for _ in range(count)], np.float32)
    wave = np.repeat(levels, FRAME)
    wave = np.concatenate([wave, np.full(tail, 0.9, np.float32)])
    wave *= np.random.default_rng(seed).choice([-1, 1], len(wave)).astype(np.float32)
    clips = cut_whole(wave)
    for before, behind in itertools.pairwise(clips):
        assert before.end <= behind.start + 1e-9
    covered = np.zeros(len(wave), bool)
    for clip in clips:
        assert clip.end - clip.start <= LONGEST_S
        place = slice(round(clip.start * RATE), round(clip.end * RATE))
        np.testing.assert_array_equal(clip.wave, wave[place])
        assert np.sum(np.abs(clip.wave) > 0.35) >= LEAST_S * RATE - 2 * FRAME
        covered[place] = True
    missed = ~covered & (np.abs(wave) >= 0.5)
    # Only what is too short to be speech may be missing: three frames at most in one place.
    edges = np.flatnonzero(np.diff(np.concatenate([[0], missed.astype(int), [0]])))
    assert all(end - start <= 3 * FRAME for start, end in edges.reshape(-1, 2))


@settings(max_examples=30)
@given(runs=runs, seed=st.integers(0, 99), window=st.sampled_from([None, 3.0]))
def test_any_chunking_gives_the_same(
    runs: list[tuple[float, int]], seed: int, window: float | None
) -> None:
    wave = np.repeat([level for level, count in runs for _ in range(count)], FRAME)
    wave = np.concatenate([wave.astype(np.float32), np.full(99, 0.7, np.float32)])
    places = np.sort(np.random.default_rng(seed).integers(0, len(wave), 7))
    chunked = cut(np.split(wave, places), loud, window=window)
    assert bounds(list(chunked)) == bounds(list(cut([wave], loud, window=window)))


def test_clips_end_at_pauses() -> None:
    speech = [(0.9, 5.0), (0.0, 0.5), (0.9, 8.0), (0.0, 0.5), (0.9, 4.0), (0.0, 1.0)]
    first, second = cut_whole(sound((0.0, 3.0), *speech))
    assert first.start == pytest.approx(3 - PAUSE_S / 2, abs=2 * FRAME_S)
    assert first.end == pytest.approx(16.5 + PAUSE_S / 2, abs=2 * FRAME_S)
    assert first.end - first.start > WANTED_S
    assert second.start == pytest.approx(17 - PAUSE_S / 2, abs=2 * FRAME_S)
    assert second.end == pytest.approx(21 + PAUSE_S / 2, abs=2 * FRAME_S)


def test_a_long_silence_ends_a_short_clip() -> None:
    assert len(cut_whole(sound((0.9, 1.0), (0.0, 1.5), (0.9, 1.0)))) == 1
    assert len(cut_whole(sound((0.9, 1.0), (0.0, 2.5), (0.9, 1.0)))) == 2


def test_speech_without_a_pause_is_cut_where_it_is_weakest() -> None:
    first, *rest = cut_whole(sound((0.9, 20.0), (0.6, 0.1), (0.9, 40.0)))
    assert first.end == pytest.approx(20.05, abs=0.1)
    assert sum(len(clip.wave) for clip in (first, *rest)) == round(60.1 * RATE)


def test_speech_ends_later_than_it_begins() -> None:
    assert cut_whole(sound((0.4, 20.0))) == []
    (clip,) = cut_whole(sound((0.9, 1.0), (0.4, 5.0)))
    assert clip.end == pytest.approx(6.0, abs=FRAME_S)


@pytest.mark.parametrize("window", [None, 5.0])
def test_silence_and_clicks_give_no_clips(window: float | None) -> None:
    assert list(cut([sound((0.0, 40.0))], loud, window=window)) == []
    assert list(cut([], loud, window=window)) == []
    assert list(cut([sound((0.9, 0.01))], loud, window=window)) == []
    assert list(cut([sound((0.0, 9.0), (0.9, 0.03), (0.0, 9.0))], loud, window=window)) == []


def test_windows_have_one_length_and_the_last_is_kept() -> None:
    clips = cut_whole(sound((0.9, 11.0), (0.0, 10.0), (0.9, 1.0)), window=5.0)
    size = int(5 * RATE / FRAME) * FRAME_S
    starts = [round(clip.start / size) for clip in clips]
    assert starts == [0, 1, 2, 4]  # nobody speaks in the fourth
    assert [round(c.end - c.start, 2) for c in clips[:3]] == [round(size, 2)] * 3
    assert clips[-1].end == pytest.approx(22.0)


@pytest.mark.parametrize("window", [0.0, -1.0, 31.0, float("nan")])
def test_a_window_that_cannot_be(window: float) -> None:
    with pytest.raises(ConfigError, match="a window must be"):
        cut([], loud, window=window)


def test_hours_take_no_more_memory_than_minutes() -> None:
    piece = sound((0.9, 7.0), (0.0, 0.5), (0.9, 6.0), (0.0, 0.5))

    def stream(minutes: int) -> Iterator[Wave]:
        for _ in range(round(minutes * 60 / 14)):
            yield piece.copy()

    def peak(minutes: int) -> tuple[int, int]:
        tracemalloc.start()
        count = sum(1 for _ in cut(stream(minutes), loud))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, most

    few, little = peak(3)
    many, much = peak(60)
    assert many > 15 * few
    assert much < 1.2 * little


# ------------------------------------------------------------------------------ the real detector


def test_the_detector_hears_any_chunking_alike() -> None:
    wave = np.concatenate([tone(0.5), np.random.default_rng(0).normal(0, 0.1, RATE)])
    wave = wave[: len(wave) // FRAME * FRAME].astype(np.float32)
    whole = Silero()(wave)
    detect = Silero()
    parts = [detect(part) for part in np.split(wave, np.array([1, 2, 5, 20]) * FRAME)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    assert len(Silero()(wave[:0])) == 0


def test_noise_and_tones_are_no_speech() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 5 * RATE).astype(np.float32)
    assert list(cut([noise, tone(5), sound((0.0, 5.0))], Silero())) == []


def test_a_voice_is_found_between_silences(tmp_path: Path) -> None:
    path = speak(tmp_path / "a.wav", "The harbour was rebuilt after the great earthquake.")
    spoken = np.concatenate(list(read_audio(path)))
    silence = sound((0.0, 4.0))
    (clip,) = cut([silence, spoken, silence], Silero())
    assert clip.start == pytest.approx(4.0, abs=0.4)
    assert clip.end == pytest.approx(4.0 + len(spoken) / RATE, abs=0.6)


@pytest.mark.data
def test_people_are_found(data_folder: Path) -> None:
    path = sorted((data_folder / "ljspeech").glob("*.flac"))[0]
    wave = np.concatenate(list(read_audio(path)))
    clips = list(cut([wave], Silero()))
    assert sum(c.end - c.start for c in clips) > 0.85 * len(wave) / RATE


def test_the_shortest_window_is_not_too_short_to_be_heard() -> None:
    clips = cut_whole(sound((0.9, 2.0)), window=LEAST_S)
    assert all(len(clip.wave) >= LEAST_S * RATE for clip in clips[:-1])

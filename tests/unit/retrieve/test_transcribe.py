"""Whisper on clips: the right words in the right clip, and none where nobody speaks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from narrows.data import read_rows
from narrows.errors import ConfigError, InputError, ModelError
from narrows.registry import build
from narrows.retrieve.audio import RATE, Wave, read_audio
from narrows.retrieve.hearing import BACKENDS
from narrows.retrieve.rank import words
from narrows.retrieve.speech_encoder import SpeechEncoder
from narrows.retrieve.transcribe import Segment, Transcriber, shortened
from tiny_sound import speak, tone


class FakePipeline:
    """Writes, for each clip, what the test says; remembers what it was asked."""

    def __init__(self, said: list[list[tuple[float, float, str, float, float]]]) -> None:
        self.said = said
        self.asked: list[dict[str, Any]] = []

    def transcribe(self, wave: Wave, **options: Any) -> tuple[list[SimpleNamespace], None]:
        self.asked.append(options)
        written = []
        for place in options["clip_timestamps"]:
            offset = int(place["start"] * RATE) / RATE
            for start, end, text, silent, sure in self.said.pop(0):
                written.append(
                    SimpleNamespace(
                        start=offset + start,
                        end=offset + end,
                        seek=int(offset * 100),
                        text=text,
                        no_speech_prob=silent,
                        avg_logprob=sure,
                    )
                )
        return written, None


def transcriber(said: list[Any], **options: Any) -> tuple[Transcriber, FakePipeline]:
    model = SimpleNamespace(
        supported_languages=["en", "de"], detect_language=lambda wave: ("de", 1.0, [])
    )
    made = Transcriber(model, **options)
    made._pipeline = FakePipeline(said)
    return made, made._pipeline


def test_each_clip_gets_its_own_text_whatever_the_lengths() -> None:
    rng = np.random.default_rng(0)
    waves = [np.ones(n, np.float32) for n in rng.integers(0.1 * RATE, 12 * RATE, 40)]
    said = [[(0.0, 0.05, f" text {i}", 0.0, -0.1), (0.05, 40.0, " more", 0, 0)] for i in range(40)]
    longest_first = sorted(range(40), key=lambda i: -len(waves[i]))
    made, fake = transcriber([said[i] for i in longest_first], batch=6)
    transcripts = made(waves)
    assert [t.text for t in transcripts] == [f"text {i} more" for i in range(40)]
    assert [len(asked["clip_timestamps"]) for asked in fake.asked] == [6] * 6 + [4]
    assert {asked["language"] for asked in fake.asked} == {"de"}
    for wave, found in zip(waves, transcripts, strict=True):
        assert found.segments[0].start == pytest.approx(0.0, abs=1e-3)
        assert found.segments[1].end == pytest.approx(len(wave) / RATE)


class NumberPipeline:
    """Writes the number that a clip is full of."""

    def transcribe(self, wave: Wave, **options: Any) -> tuple[list[SimpleNamespace], None]:
        starts = [place["start"] for place in options["clip_timestamps"]]
        told = {"start": 0.0, "end": 0.0, "no_speech_prob": 0.0, "avg_logprob": 0.0}
        return [
            SimpleNamespace(seek=int(at * 100), text=str(int(wave[round(at * RATE)])), **told)
            for at in starts
        ], None


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_may_be_read_at_the_same_time(workers: int) -> None:
    lengths = np.random.default_rng(1).integers(0.1 * RATE, 12 * RATE, 40)
    made, _ = transcriber([], batch=3, workers=workers)
    made._pipeline = NumberPipeline()
    found = made([np.full(n, i + 1, np.float32) for i, n in enumerate(lengths)])
    assert [t.text for t in found] == [str(i + 1) for i in range(40)]


def test_silence_is_empty_and_empty_clips_are_not_asked_about() -> None:
    silent, sure = (0.0, 1.0, " you", 0.74, -1.1), (0.0, 1.0, " Hm.", 0.74, -0.3)
    made, fake = transcriber([[silent], [sure], [(0.0, 1.0, "  ", 0.0, 0.0)]])
    clip, nothing = np.ones(RATE, np.float32), np.zeros(0, np.float32)
    assert [t.text for t in made([clip, nothing, clip, nothing, clip])] == ["", "", "Hm.", "", ""]
    assert len(fake.asked) == 1
    assert made([]) == []
    assert made([nothing, np.zeros(RATE, np.float32)])[1].segments == ()
    assert len(fake.asked) == 1


def test_going_in_circles_is_silence_where_nobody_seems_to_speak() -> None:
    made, _ = transcriber([[(0.0, 1.0, " And round.", p, -0.1)] * 20 for p in (0.7, 0.5)])
    found = [t.text for t in made([np.ones(RATE, np.float32)] * 2)]
    assert found == ["", " ".join(["And round."] * 20)]


@pytest.mark.parametrize(
    ("filled", "tail", "left"),
    [
        (1601, 0.0, 1700),
        (1600, 0.0, 1600),
        (1600, 2.0, 1800),
        (2950, 2.0, 3000),
        (1, 30, 3000),
        (100, 4.0, 1500),
        (1100, 4.0, 1500),
        (1101, 4.0, 1600),
    ],
)
def test_what_clips_are_filled_up_with_is_left_out(filled: int, tail: float, left: int) -> None:
    features = np.zeros((2, 3, 3000), np.float32)
    features[0, 1, :filled] = 1.0
    features[1, 2, : filled // 2] = -1.0  # a shorter clip of the same batch
    assert np.array_equal(shortened(features, tail), features[..., :left])
    assert np.array_equal(shortened(features[0], tail), features[0, :, :left])
    nothing = np.zeros((1, 3, 3000), np.float32)
    assert shortened(nothing, tail).shape == nothing.shape


def test_a_language_that_is_given_is_not_listened_for() -> None:
    made, fake = transcriber([[], []], language="en")
    made([np.ones(RATE, np.float32)] * 2)
    assert fake.asked[0]["language"] == "en"


@pytest.mark.model
def test_loading_leaves_torch_its_threads() -> None:
    cuda = pytest.importorskip("ctranslate2").get_cuda_device_count()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        try:
            made = Transcriber.load()
        except ModelError as error:
            pytest.skip(str(error))
        assert torch.get_num_threads() == 3
        assert made.workers == (1 if cuda else 2)
        assert Transcriber.load(tail=30).workers == 1
        SpeechEncoder.load()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_asked() -> None:
    made, _ = transcriber([])
    with pytest.raises(InputError, match="longer than 30 s"):
        made([np.zeros(31 * RATE, np.float32)])
    with pytest.raises(ConfigError, match="no language 'xx'"):
        transcriber([], language="xx")
    for tail in ("-1", "31", "inf", "nan", "long"):
        with pytest.raises(ConfigError, match="tail must be 0 to 30 seconds"):
            build(BACKENDS, f"transcript:tail={tail}")
    with pytest.raises(ConfigError, match="has no option among: speed"):
        build(BACKENDS, "transcript:speed=2")


# ------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def whisper() -> Transcriber:
    try:
        return Transcriber.load(language="en")
    except ModelError as error:
        pytest.skip(str(error))


@pytest.mark.model
def test_another_model_is_no_recogniser() -> None:
    with pytest.raises(ModelError, match="is no Whisper"):
        Transcriber.load("all-minilm-l6-v2")


@pytest.mark.model
def test_synthetic_speech_and_silence(whisper: Transcriber, tmp_path: Path) -> None:
    path = speak(tmp_path / "a.wav", "The harbour was rebuilt after the great earthquake.")
    spoken = np.concatenate(list(read_audio(path)))
    silence = np.zeros(2 * RATE, np.float32)
    noise = (0.01 * np.random.default_rng(0).standard_normal(4 * RATE)).astype(np.float32)
    heard, nothing, hiss, hum = whisper([spoken, silence, noise, tone(2)])
    assert {"rebuilt", "great", "earthquake"} <= set(words(heard.text))
    assert all(0 <= s.start <= s.end <= len(spoken) / RATE for s in heard.segments)
    assert isinstance(heard.segments[0], Segment)
    assert nothing.text == hiss.text == ""
    assert len(words(hum.text)) < 4


@pytest.mark.model
def test_clips_are_encoded_one_by_one_as_together(whisper: Transcriber) -> None:
    features = np.random.default_rng(0).standard_normal((3, 80, 3000)).astype(np.float32)
    features[..., 1200:] = 0.0
    model = whisper._pipeline.model
    singly, together = (
        np.array(model.encode(features)),
        np.array(type(model).encode(model, features[..., :1600])),
    )
    assert singly.shape == together.shape == (3, 800, 512)
    assert singly == pytest.approx(together, abs=1e-2)
    assert np.abs(singly[0] - together[1]).max() > 0.1
    assert np.array(model.encode(features[0])).shape == (1, 800, 512)


@pytest.mark.model
@pytest.mark.data
def test_people_are_understood(whisper: Transcriber, data_folder: Path) -> None:
    folder = data_folder / "ljspeech"
    rows = [row for _, row in zip(range(3), read_rows(folder / "transcripts.jsonl"), strict=False)]
    waves = [np.concatenate(list(read_audio(folder / f"{row['id']}.flac"))) for row in rows]
    for row, found in zip(rows, whisper(waves), strict=True):
        true = set(words(row["normalized"]))
        assert len(true & set(words(found.text))) > 0.7 * len(true)

"""What we lean on in faster-whisper, so that a release that moves it is noticed here."""

from __future__ import annotations

import dataclasses
import inspect

from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper.transcribe import Segment
from faster_whisper.vad import get_vad_model

from narrows.retrieve.voice import CONTEXT, FRAME, UNITS


def test_the_voice_detector_takes_frames_and_its_memory() -> None:
    session = get_vad_model().session
    inputs = {i.name: i.shape for i in session.get_inputs()}
    assert set(inputs) == {"input", "h", "c"}
    assert inputs["input"][-1] == CONTEXT + FRAME
    assert inputs["h"][-1] == inputs["c"][-1] == UNITS
    assert len(session.get_outputs()) == 3


def test_batches_take_the_places_of_clips() -> None:
    parameters = inspect.signature(BatchedInferencePipeline.transcribe).parameters
    wanted = "language clip_timestamps batch_size beam_size temperature without_timestamps"
    assert {*wanted.split(), "max_new_tokens"} <= set(parameters)
    fields = {field.name for field in dataclasses.fields(Segment)}
    assert {"seek", "start", "end", "text", "avg_logprob", "no_speech_prob"} <= fields
    assert isinstance(WhisperModel.supported_languages, property)

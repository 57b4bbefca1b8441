"""The recogniser that comes with the package, on a human voice."""

from __future__ import annotations

import numpy as np
import pytest

from narrows.bench.spoken import human
from narrows.errors import ConfigError, InputError, ModelError
from narrows.registry import build
from narrows.retrieve.audio import RATE
from narrows.retrieve.clsr_backend import SHIPPED
from narrows.retrieve.hearing import BACKENDS
from narrows.retrieve.speech_encoder import STATE_SECONDS
from narrows.train.clsr import edits, error_rate, piece_ids

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def backend():
    pytest.importorskip("ctranslate2")
    made = build(BACKENDS, "clsr")
    try:
        _ = made.speech, made.embedder
    except (ConfigError, ModelError) as error:
        pytest.skip(str(error))
    return made


@pytest.fixture(scope="module")
def clips(data_folder):
    try:
        return [clip for clip in human(data_folder) if clip.seconds < 10][:12]
    except InputError as error:
        pytest.skip(str(error))


def test_it_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 25e6


def test_most_pieces_are_right(backend, clips):
    written = [one.ids for one in backend.write([clip.wave for clip in clips])]
    right = [piece_ids(clip.text, backend.embedder) for clip in clips]
    assert error_rate(written, right) < 0.4
    assert error_rate(written, right[1:] + right[:1]) > 0.8  # negative control


def test_a_second_pass_gets_more_right(backend, clips):
    once = build(BACKENDS, "clsr:passes=1")
    right = [piece_ids(clip.text, backend.embedder) for clip in clips]
    waves = [clip.wave for clip in clips]
    first, second = ([one.ids for one in ear.write(waves)] for ear in (once, backend))
    assert error_rate(second, right) < error_rate(first, right)


def test_a_second_sentence_is_heard_where_it_was_said(backend, clips):
    """Two recordings end to end: what starts behind the first, to a state and a tenth of a second,
    is what is heard in the second alone (sheet, oracle 27)."""
    apart = {0.0: 0, 1.0: 0, -1.0: 0}
    said = 0
    for one, other in zip(clips[::2], clips[1::2], strict=True):
        first, second, both = backend.write(
            [one.wave, other.wave, np.concatenate([one.wave, other.wave])]
        )
        border = len(one.wave) / RATE - STATE_SECONDS - 0.1
        said += len(first.ids) + len(second.ids)
        for shift in apart:
            n = sum(start < border + shift for start, _ in both.times)
            apart[shift] += edits(both.ids[:n], first.ids) + edits(both.ids[n:], second.ids)
    assert apart[0.0] < 0.35 * said
    assert min(apart[1.0], apart[-1.0]) > 1.2 * apart[0.0]  # negative controls

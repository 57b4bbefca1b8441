"""Recordings in, clips with times out: each heard once, whatever interrupts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narrows import listen
from narrows.errors import ConfigError, InputError
from narrows.retrieve.audio import RATE, Wave
from narrows.retrieve.clips import PAUSE_S
from narrows.retrieve.hearing import Heard
from narrows.retrieve.speech_index import SpeechIndex
from tiny_ear import Ear, instead_of_models, talk, word_of
from tiny_sound import speak, write_wav


@pytest.fixture(autouse=True)
def ears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> list[Ear]:
    """The ears that were made, for tests without the real model."""
    if request.node.get_closest_marker("model"):
        return []
    return instead_of_models(monkeypatch, tmp_path / "cache")


@pytest.fixture
def talks(tmp_path: Path) -> list[str]:
    """Two recordings; the words begin every three and a half seconds."""
    spoken = {"a.wav": talk("harbour", "bridge", "bread"), "b.wav": talk("penguin", "bridge")}
    return [str(write_wav(tmp_path / name, wave)) for name, wave in spoken.items()]


def said(index: Path, question: str) -> list[str]:
    return [hit.text for hit in listen.search(index, question, mode="words")]


def test_clips_are_found_with_their_times(talks: list[str], tmp_path: Path) -> None:
    made = listen.index(talks, tmp_path / "talks")
    assert [entry.clips for entry in made.entries] == [3, 2]
    assert [entry.seconds for entry in made.entries] == [10.5, 7.0]
    hits = listen.search(tmp_path / "talks", "Bridge?", mode="words")
    assert [(Path(hit.name).name, hit.text) for hit in hits] == [
        ("a.wav", "the bridge"),
        ("b.wav", "the bridge"),
    ]
    for hit in hits:
        assert hit.start == pytest.approx(3.5 - PAUSE_S / 2, abs=0.05)
        assert hit.end == pytest.approx(4.5 + PAUSE_S / 2, abs=0.05)
    best = listen.search(tmp_path / "talks", "Where is bread sold?", 1)
    assert [h.text for h in best] == ["the bread"]
    assert said(tmp_path / "talks", "zebra") == []


def test_one_by_one_or_together_is_the_same(talks: list[str], tmp_path: Path) -> None:
    listen.index(talks, tmp_path / "one")
    for talk_file in talks:
        listen.index([talk_file], tmp_path / "two")
    headers = [(tmp_path / name / "index.json").read_bytes() for name in ("one", "two")]
    assert headers[0] == headers[1]


def test_what_is_there_is_not_heard_again(
    talks: list[str], tmp_path: Path, ears: list[Ear]
) -> None:
    listen.index(talks[:1], tmp_path / "talks")
    told: list[float] = []
    listen.index(talks, tmp_path / "talks", on_heard=told.append)
    assert [ear.clips for ear in ears] == [3, 2]
    assert sum(told) == pytest.approx(17.5)


def test_a_changed_recording_takes_the_place_of_what_it_was(
    talks: list[str], tmp_path: Path
) -> None:
    listen.index(talks, tmp_path / "talks")
    write_wav(Path(talks[0]), talk("penguin"))
    made = listen.index(talks, tmp_path / "talks")
    assert [entry.clips for entry in made.entries] == [2, 1]
    assert said(tmp_path / "talks", "harbour") == []


def test_an_interrupted_run_is_gone_on_with(
    talks: list[str], tmp_path: Path, ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Ear.hear

    def interrupted(self: Ear, waves: list[Wave]) -> Any:
        if word_of(waves[0]) == "penguin":
            raise KeyboardInterrupt
        return real(self, waves)

    monkeypatch.setattr(Ear, "hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        listen.index(talks, tmp_path / "talks")
    assert len(SpeechIndex.open(tmp_path / "talks").entries) == 1
    monkeypatch.setattr(Ear, "hear", real)
    listen.index(talks, tmp_path / "talks")
    assert ears[-1].clips == 2
    assert len(said(tmp_path / "talks", "bridge")) == 2


def test_a_bad_file_is_told_before_anything_is_heard(talks: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.wav").write_text("no sound")
    with pytest.raises(InputError, match="no sound that can be read"):
        listen.index([*talks, str(tmp_path / "c.wav")], tmp_path / "talks")
    assert not (tmp_path / "talks").exists()


def test_silence_is_in_the_index_and_never_found(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "s.wav", np.zeros(5 * RATE, np.float32))
    made = listen.index([path], tmp_path / "talks")
    assert [entry.clips for entry in made.entries] == [0]
    assert listen.search(tmp_path / "talks", "bread") == []
    assert listen.Listener.hear([path]).passages("bread") == []


def test_an_index_keeps_to_what_made_it(talks: list[str], tmp_path: Path, ears: list[Ear]) -> None:
    listen.index(talks[:1], tmp_path / "talks", backend="transcript:hears=ear 2")
    listen.index(talks, tmp_path / "talks")  # by the index's own
    assert ears[-1].hears == "ear 2"
    with pytest.raises(ConfigError, match="was heard by ear 2, not by ear 1"):
        listen.index(talks, tmp_path / "talks", backend="transcript")
    with pytest.raises(ConfigError, match="was encoded by mind 1, not by mind 2"):
        listen.index(talks, tmp_path / "talks", backend="transcript:hears=ear 2,encodes=mind 2")


def test_windows(talks: list[str], tmp_path: Path) -> None:
    listen.index(talks[:1], tmp_path / "talks", window=3.5)
    (recording,) = SpeechIndex.open(tmp_path / "talks").recordings()
    np.testing.assert_allclose(recording.times, [[0, 3.5], [3.5, 7], [7, 10.5]], atol=0.05)
    with pytest.raises(ConfigError, match="a window must be"):
        listen.index(talks, tmp_path / "talks", window=99)


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0:00"), (59.99, "0:59"), (751.2, "12:31"), (4351, "1:12:31")]
)
def test_times_are_read_by_people(seconds: float, told: str) -> None:
    assert listen.at(seconds) == told


# ------------------------------------------------------------------------------------- passages


def test_passages_are_clips_in_the_order_they_were_said(
    talks: list[str], tmp_path: Path, ears: list[Ear]
) -> None:
    given = listen.Listener.hear(talks).passages("Bridge or penguin?", 3)
    assert [document.name for document, _ in given] == [
        "a.wav 0:03-0:04",
        "b.wav 0:00-0:01",
        "b.wav 0:03-0:04",
    ]
    assert [document.text for document, _ in given] == ["the bridge", "the penguin", "the bridge"]
    assert all(score > 0 for _, score in given)
    assert sum(ear.clips for ear in ears) == 5
    assert listen.Listener.hear(talks).passages("Bridge or penguin?", 3) == given
    assert sum(ear.clips for ear in ears) == 5  # heard once


def test_hits_of_a_backend_that_spells_badly_are_transcribed_and_ranked_again(
    talks: list[str], ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ear that transcribes hears "bridge" where the first heard bread, and nothing else."""
    listener = listen.Listener.hear(talks, backend="transcript:verbatim=no")
    (first,) = {id(ear): ear for ear in ears if ear.clips}.values()
    usual = Ear._heard

    def other(self: Ear, word: str) -> Heard:
        if self.verbatim:
            return usual(self, {"bread": "bridge"}.get(word, "penguin"))
        return usual(self, word)

    monkeypatch.setattr(Ear, "_heard", other)
    assert [hit.clip for hit in listener.search("bridge", 2)] == [1, 1]
    (best, *_) = listener.search("bridge", 2, rerank=5)
    assert (Path(best.name).name, best.clip, round(best.start)) == ("a.wav", 2, 7)
    assert best.text == "the bridge"
    assert first.clips == 5
    (writer,) = (ear for ear in ears if ear.verbatim)
    assert writer.clips == 5
    # What is not among the clips that are transcribed is not found; each is transcribed once.
    assert [hit.text for hit in listener.search("bridge", 1, rerank=3)] == ["the penguin"]
    documents = [document.text for document, _ in listener.passages("bridge", 1)]
    assert documents == ["the bridge"]
    assert writer.clips == 5


def test_only_what_is_badly_written_is_ranked_again(talks: list[str], tmp_path: Path) -> None:
    listen.index(talks, tmp_path / "talks")
    with pytest.raises(ConfigError, match="holds transcripts already"):
        listen.search(tmp_path / "talks", "bridge", rerank=3)
    with pytest.raises(ConfigError, match="rerank must be at least 0"):
        listen.search(tmp_path / "talks", "bridge", rerank=-1)


@pytest.mark.model
def test_spoken_sentences_are_found(tmp_path: Path) -> None:
    sentences = [
        "The harbour was rebuilt after the great earthquake.",
        "The bakery on Mill Street sells fresh bread at six in the morning.",
        "Penguins cannot fly, but they swim very well in cold water.",
    ]
    files = [speak(tmp_path / f"{i}.wav", text) for i, text in enumerate(sentences)]
    listen.index(files, tmp_path / "talks", backend="transcript:language=en")
    listener = listen.Listener.open(tmp_path / "talks")
    for question, name in (
        ("Which birds are good swimmers?", "2.wav"),
        ("When does the bread shop open?", "1.wav"),
        ("What was damaged in the earthquake?", "0.wav"),
    ):
        assert Path(listener.search(question, 1)[0].name).name == name


def test_a_recording_that_was_renamed_is_not_lost(
    talks: list[str], tmp_path: Path, ears: list[Ear]
) -> None:
    listen.index(talks[:1], tmp_path / "talks")
    moved = Path(talks[0]).rename(tmp_path / "old.wav")
    write_wav(Path(talks[0]), talk("penguin"))
    made = listen.index([moved, talks[0]], tmp_path / "talks")
    assert [Path(entry.name).name for entry in made.entries] == ["old.wav", "a.wav"]
    assert [ear.clips for ear in ears] == [3, 1]
    (hit,) = listen.search(tmp_path / "talks", "harbour", mode="words")
    assert hit.name == str(moved)


def test_what_could_not_hear_is_not_kept(
    talks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(self: Ear, waves: list[Wave]) -> Any:
        raise ConfigError("no such language")

    with monkeypatch.context() as patched:
        patched.setattr(Ear, "hear", deaf)
        with pytest.raises(ConfigError, match="language"):
            listen.index(talks, tmp_path / "talks")
    assert not (tmp_path / "talks" / "index.json").exists()
    assert len(listen.index(talks, tmp_path / "talks").entries) == 2


def test_another_file_of_that_name_is_not_played(talks: list[str], tmp_path: Path) -> None:
    listen.index(talks[:1], tmp_path / "talks")
    (hit,) = listen.search(tmp_path / "talks", "bridge", mode="words")
    (wave,) = listen.sound(hit.name, hit.digest, [(hit.start, hit.end)])
    assert len(wave) == pytest.approx((hit.end - hit.start) * RATE, abs=1)
    write_wav(Path(talks[0]), talk("penguin"))
    with pytest.raises(InputError, match="not the recording that was heard"):
        listen.sound(hit.name, hit.digest, [(hit.start, hit.end)])


def test_a_recording_given_twice_is_one(talks: list[str]) -> None:
    passages = listen.Listener.hear([talks[0], talks[0], talks[1]]).passages("the bridge", 5)
    names = [document.name for document, _ in passages]
    assert len(names) == len(set(names)) == 5


def test_folders_of_a_backend_are_found_from_everywhere(
    talks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "mind").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    made = listen.index(talks, tmp_path / "talks", backend="transcript:encodes=mind,hears=one")
    monkeypatch.chdir(tmp_path)
    assert made.origin.backend == f"transcript:encodes={tmp_path / 'here' / 'mind'},hears=one"
    assert len(said(tmp_path / "talks", "bridge")) == 2

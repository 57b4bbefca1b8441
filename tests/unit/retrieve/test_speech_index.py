"""The index on disk: what is put in comes out, whatever happens to the process or the files."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from narrows import files
from narrows.errors import ConfigError, InputError
from narrows.retrieve.hearing import Guesses, Heard
from narrows.retrieve.speech_index import HEADER, Entry, Origin, Recording, SpeechIndex

ORIGIN = Origin("fake", "ear 1", "mind 1")


def recording(seed: int, name: str = "", clips: int = 3, width: int = 8) -> Recording:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(clips, width)).astype(np.float32)
    heard = [
        Heard(
            f"clip {i} of {seed}: naïve — 猫" * (i != 1), rng.integers(0, 30_522, i).astype("i4"), v
        )
        for i, v in enumerate(vectors)
    ]
    times = np.cumsum(rng.random(2 * clips)).reshape(clips, 2)
    return Recording(f"{seed:064d}", name or f"/talks/{seed}.wav", 60.0 + seed, times, heard)


def same(one: Recording, other: Recording) -> None:
    assert (one.digest, one.name, one.seconds) == (other.digest, other.name, other.seconds)
    assert len(one.heard) == len(other.heard)
    np.testing.assert_array_equal(one.times, other.times)
    for a, b in zip(one.heard, other.heard, strict=True):
        assert a.text == b.text
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.vector, b.vector)
        assert (a.tokens.dtype, a.vector.dtype) == (b.tokens.dtype, b.vector.dtype)
        assert (a.guesses is None) == (b.guesses is None)
        if a.guesses is not None:
            for part in ("ids", "chances"):
                theirs = getattr(b.guesses, part)
                np.testing.assert_array_equal(getattr(a.guesses, part), theirs)
                assert getattr(a.guesses, part).dtype == theirs.dtype


def guessed(seed: int) -> Recording:
    """The same with three guesses of every token; in one clip nothing was said."""
    made = recording(seed)
    rng = np.random.default_rng(seed)
    heard = []
    for one in made.heard:
        size = (len(one.tokens), 3)
        told = Guesses(rng.integers(0, 9, size).astype("i4"), rng.random(size).astype("f2"))
        heard.append(replace(one, guesses=told))
    return replace(made, heard=heard)


def names(index: SpeechIndex) -> list[str]:
    return [entry.name for entry in SpeechIndex.open(index.folder).entries]


@pytest.fixture
def index(tmp_path: Path) -> SpeechIndex:
    made = SpeechIndex.create(tmp_path / "talks", ORIGIN)
    made.add(recording(1))
    made.add(recording(2))
    return made


def test_guesses_are_kept(index: SpeechIndex) -> None:
    index.add(guessed(3))
    index.add(recording(4, clips=0))
    again = SpeechIndex.open(index.folder)
    same(again.recording(f"{3:064d}"), guessed(3))
    same(again.recording(f"{1:064d}"), recording(1))


def test_what_is_put_in_comes_out(index: SpeechIndex) -> None:
    again = SpeechIndex.open(index.folder)
    assert again.origin == ORIGIN
    assert again.entries == index.entries
    for seed, found in zip((1, 2), again.recordings(), strict=True):
        same(found, recording(seed))
    assert recording(1).digest in again
    assert recording(3).digest not in again


def test_recordings_without_clips_do_not_share_a_file(index: SpeechIndex) -> None:
    index.add(recording(3, clips=0))
    index.add(recording(4, clips=0))
    index.delete(recording(3).digest)
    found = list(SpeechIndex.open(index.folder).recordings())
    assert [len(r.heard) for r in found] == [3, 3, 0]


def test_one_by_one_or_merged_is_the_same(index: SpeechIndex, tmp_path: Path) -> None:
    first, second = (SpeechIndex.create(tmp_path / name, ORIGIN) for name in "ab")
    first.add(recording(1))
    second.add(recording(2))
    first.merge(second)
    assert first.entries == index.entries
    assert (first.folder / HEADER).read_bytes() == (index.folder / HEADER).read_bytes()


def test_deleting(index: SpeechIndex) -> None:
    index.delete(recording(1).digest)
    assert names(index) == [recording(2).name]
    assert len(list(index.folder.glob("*.safetensors"))) == 1
    with pytest.raises(InputError, match="holds no recording"):
        index.delete(recording(1).digest)


def test_a_changed_file_takes_the_place_of_what_it_was(index: SpeechIndex) -> None:
    index.add(recording(3, name=recording(1).name))
    assert names(index) == [recording(2).name, recording(1).name]
    assert len(list(index.folder.glob("*.safetensors"))) == 2


def test_the_same_sound_under_another_name(index: SpeechIndex) -> None:
    index.add(recording(1, name="/moved.wav"))
    assert names(index) == [recording(2).name, "/moved.wav"]
    assert len(list(SpeechIndex.open(index.folder).recordings())) == 2


WRITER = """
    import sys; sys.path[:0] = sys.argv[2].split(":")
    from pathlib import Path
    from test_speech_index import recording
    from narrows.retrieve.speech_index import SpeechIndex
    index = SpeechIndex.open(Path(sys.argv[1]))
    print("ready", flush=True); sys.stdin.readline()
    for seed in range(int(sys.argv[3]), int(sys.argv[3]) + 6):
        index.add(recording(seed))
"""


def test_two_writers_lose_nothing(index: SpeechIndex) -> None:
    here = Path(__file__).parent
    where = f"{here}:{here.parents[1]}"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), index.folder, where, str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (10, 20)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n")
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(list(SpeechIndex.open(index.folder).recordings())) == 14


# ------------------------------------------------------------------------------------ what fails


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CHANGES: dict[str, Callable[[SpeechIndex], None]] = {
    "add": lambda index: index.add(recording(3)),
    "add again": lambda index: index.add(recording(1, clips=5)),
    "delete": lambda index: index.delete(recording(1).digest),
}


@pytest.mark.parametrize(
    ("change", "step"),
    [("add", 1), ("add", 2), ("add again", 1), ("add again", 2), ("delete", 1)],
)
def test_a_disk_that_fills_up_leaves_the_index(
    index: SpeechIndex, monkeypatch: pytest.MonkeyPatch, change: str, step: int
) -> None:
    before = SpeechIndex.open(index.folder).entries
    steps: list[Path] = []
    real = files.os.replace

    def replace(source: Path, target: Path) -> None:
        steps.append(target)
        if len(steps) == step:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(InputError, match="No space left on device"):
        CHANGES[change](index)
    monkeypatch.undo()
    again = SpeechIndex.open(index.folder)
    assert again.entries == index.entries == before
    assert len(list(again.recordings())) == 2
    index.add(recording(3))
    assert len(names(index)) == 3


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [_cut, _flip, Path.unlink])
def test_a_spoiled_recording_is_refused(index: SpeechIndex, spoil: Callable[[Path], None]) -> None:
    spoil(index.folder / f"{index.entries[0].checksum}.safetensors")
    with pytest.raises(InputError, match=r"index /talks/1\.wav again") as caught:
        list(index.recordings())
    assert "\n" not in str(caught.value)


def _rename(path: Path) -> None:
    path.write_text(path.read_text().replace("/talks/1.wav", "/talks/9.wav"))


def _version(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_cut, "damaged or changed"),
        (_rename, "its checksum is wrong"),
        (_version, "version 2, but this reads 1"),
        (lambda path: path.write_text("[]"), "damaged or changed"),
        (lambda path: path.write_text("{}"), "another kind"),
        (Path.unlink, "no speech index in"),
    ],
)
def test_a_spoiled_header_is_refused(
    index: SpeechIndex, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(index.folder / HEADER)
    for attempt in (lambda: SpeechIndex.open(index.folder), lambda: index.add(recording(3))):
        with pytest.raises(InputError, match=says) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_another_recogniser_or_encoder_is_refused(index: SpeechIndex, tmp_path: Path) -> None:
    index.check("ear 1", "mind 1")
    index.check(None, "mind 1")
    with pytest.raises(ConfigError, match="was encoded by mind 1, not by mind 2"):
        index.check(None, "mind 2")
    other = SpeechIndex.create(tmp_path / "other", Origin("fake", "ear 2", "mind 1"))
    with pytest.raises(ConfigError, match="was heard by ear 1, not by ear 2"):
        index.merge(other)


def test_an_index_is_not_made_where_something_is(tmp_path: Path, index: SpeechIndex) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="holds other files"):
        SpeechIndex.create(tmp_path / "full", ORIGIN)
    assert SpeechIndex.create(index.folder, ORIGIN).entries == index.entries
    with pytest.raises(InputError, match="cannot make the index"):
        SpeechIndex.create(tmp_path / "file", ORIGIN)
    assert SpeechIndex.create(tmp_path / "new" / "one", ORIGIN).entries == []


def test_entries_are_plain_facts(index: SpeechIndex) -> None:
    assert index.entries[0] == Entry(
        recording(1).digest, "/talks/1.wav", 61.0, 3, index.entries[0].checksum
    )

"""The index of what is said in recordings, on disk: a folder with a file for each recording.

``index.json`` names the recordings, the checksums of their files, and what heard them. A recording
is in the index once that file says so: its own file, named by its checksum, is written first, and
either is put in place whole, so an interrupted run leaves the index as it was. Writers take turns
by a lock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from narrows.errors import ConfigError, InputError, reason
from narrows.files import replacing
from narrows.retrieve.hearing import Guesses, Heard

HEADER, LOCK = "index.json", ".lock"
FORMAT = "narrows speech index"
VERSION = 1
NAMES = ("ids", "chances")
"""The parts of ``Guesses``."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What was heard in one recording, clip by clip.

    ``digest`` is the sha256 of the file, ``name`` its path, ``seconds`` its length; ``times``
    float64 ``[n, 2]`` are the starts and ends of the clips in seconds.
    """

    digest: str
    name: str
    seconds: float
    times: NDArray[np.float64]
    heard: Sequence[Heard]


@dataclass(frozen=True, slots=True)
class Entry:
    """A recording as the index lists it; ``checksum`` is the sha256 of its file there."""

    digest: str
    name: str
    seconds: float
    clips: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Origin:
    """What made an index: the ``backend``'s spec, and what it says it ``hears`` and ``encodes``
    with (see ``hearing.Backend``)."""

    backend: str
    hears: str
    encodes: str


class SpeechIndex:
    """An index in ``folder``; see ``create`` and ``open``."""

    def __init__(self, folder: Path, origin: Origin, entries: Sequence[Entry]) -> None:
        self.folder = folder
        self.origin = origin
        self._entries = {entry.digest: entry for entry in entries}

    @classmethod
    def create(cls, folder: Path, origin: Origin) -> SpeechIndex:
        """An empty index, or the one that another process has made there meanwhile. Raises
        InputError where something else is, or cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / LOCK):
                if (folder / HEADER).exists():
                    return cls.open(folder)
                if any(not path.name.startswith(".") for path in folder.iterdir()):
                    raise InputError(f"{folder} holds other files: name a new folder for the index")
                index = cls(folder, origin, ())
                index._write()
                return index
        except OSError as error:
            raise InputError(
                f"cannot make the index {folder} ({error.strerror}): name a folder you may write"
            ) from None

    @classmethod
    def open(cls, folder: Path) -> SpeechIndex:
        """The index that is there. Raises InputError if none is, or if it was damaged, changed or
        made by another version."""
        return cls(folder, *_read(folder / HEADER))

    @property
    def entries(self) -> list[Entry]:
        """What is in it, in the order it came."""
        return list(self._entries.values())

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def add(self, recording: Recording) -> None:
        """Put a recording in, instead of one of the same digest or name. Raises InputError if the
        disk refuses; the index is then as it was."""
        with self._turn():
            data = _packed(recording)
            entry = Entry(
                recording.digest,
                recording.name,
                recording.seconds,
                len(recording.heard),
                hashlib.sha256(data).hexdigest(),
            )
            with replacing(self._place(entry)) as beside:
                beside.write_bytes(data)
            stale = [e.digest for e in self.entries if e.name == entry.name]
            self._commit({entry.digest: entry}, stale)

    def rename(self, digest: str, name: str) -> None:
        """Note that a recording is another file now. Raises InputError as ``add``, or if it is not
        in."""
        with self._turn():
            self._commit({digest: replace(self._entry(digest), name=name)}, ())

    def discard(self) -> None:
        """Take the index away if nothing is in it. Raises InputError if it cannot be written."""
        with self._turn():
            if not self._entries:
                (self.folder / HEADER).unlink()

    def delete(self, digest: str) -> None:
        """Take a recording out. Raises InputError if it is not in."""
        with self._turn():
            self._commit({}, [self._entry(digest).digest])

    def merge(self, other: SpeechIndex) -> None:
        """Put in all that ``other`` holds. Raises ConfigError if something else heard it."""
        self.check(other.origin.hears, other.origin.encodes)
        for recording in other.recordings():
            self.add(recording)

    def recordings(self) -> Iterator[Recording]:
        """What was heard, in the order it came. Raises InputError for a file that is missing,
        damaged or changed."""
        for entry in self.entries:
            yield _load(self._place(entry), entry)

    def recording(self, digest: str) -> Recording:
        """What was heard in one recording. Raises InputError if it is not in, or as
        ``recordings``."""
        entry = self._entry(digest)
        return _load(self._place(entry), entry)

    def check(self, hears: str | None, encodes: str) -> None:
        """Raise ConfigError unless vectors of this encoder, and text of this recogniser if one is
        named, may go with what is here."""
        for what, here, given in (
            ("heard", self.origin.hears, hears),
            ("encoded", self.origin.encodes, encodes),
        ):
            if given not in (None, here):
                raise ConfigError(
                    f"{self.folder} was {what} by {here}, not by {given}: use that one, or make "
                    "another index"
                )

    def _entry(self, digest: str) -> Entry:
        if digest not in self._entries:
            raise InputError(f"{self.folder} holds no recording {digest}")
        return self._entries[digest]

    def _place(self, entry: Entry) -> Path:
        return self.folder / f"{entry.checksum}.safetensors"

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone at work on the folder, on what it holds now."""
        try:
            turn = FileLock(self.folder / LOCK).acquire()
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror}") from None
        with turn:
            now = SpeechIndex.open(self.folder)
            self.check(now.origin.hears, now.origin.encodes)
            self._entries = now._entries
            yield

    def _commit(self, new: dict[str, Entry], old: Sequence[str]) -> None:
        """List other recordings, then drop the files of those no longer listed."""
        before = self._entries
        self._entries = {k: e for k, e in before.items() if k not in old and k not in new} | new
        try:
            self._write()
        except InputError:
            self._entries = before
            raise
        kept = {self._place(entry) for entry in self.entries}
        for place in {self._place(entry) for entry in before.values()} - kept:
            place.unlink(missing_ok=True)

    def _write(self) -> None:
        told = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self.origin),
            "recordings": [asdict(entry) for entry in self.entries],
        }
        told["checksum"] = _checksum(told)
        with replacing(self.folder / HEADER) as beside:
            beside.write_text(json.dumps(told, indent=1), encoding="utf-8")


def _read(path: Path) -> tuple[Origin, list[Entry]]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.get("format") != FORMAT:
            raise ValueError("it is of another kind")
        if told.get("version") != VERSION:
            raise InputError(
                f"{path} is of version {told.get('version')}, but this reads {VERSION}: index the "
                "recordings again"
            )
        if told.pop("checksum", None) != _checksum(told):
            raise ValueError("its checksum is wrong")
        origin = Origin(told["backend"], told["hears"], told["encodes"])
        return origin, [Entry(**entry) for entry in told["recordings"]]
    except FileNotFoundError:
        raise InputError(
            f"there is no speech index in {path.parent}: make one with narrows listen index"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}): it was damaged or changed; index the "
            "recordings again"
        ) from None


def _checksum(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _packed(recording: Recording) -> bytes:
    texts = [heard.text.encode() for heard in recording.heard]
    tokens = [heard.tokens for heard in recording.heard]
    vectors = [heard.vector for heard in recording.heard]
    arrays = {
        "times": np.asarray(recording.times, np.float64).reshape(-1, 2),
        "vectors": np.array(vectors, np.float32) if vectors else np.zeros((0, 0), np.float32),
        "tokens": np.concatenate([*tokens, np.zeros(0, np.int32)]),
        "token_ends": _ends(tokens),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_ends": _ends(texts),
    }
    guesses = [heard.guesses for heard in recording.heard if heard.guesses is not None]
    if guesses and len(guesses) == len(recording.heard):
        width = max(one.ids.shape[1] for one in guesses)
        for name in NAMES:
            rows = [getattr(one, name).reshape(-1, width) for one in guesses]
            arrays[f"guessed_{name}"] = np.concatenate(rows)
    packed: bytes = save(arrays, {"recording": recording.digest})
    return packed


def _ends(pieces: Sequence[Any]) -> NDArray[np.int64]:
    return np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def _load(path: Path, entry: Entry) -> Recording:
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.checksum:
            raise ValueError("its checksum is wrong")
        arrays = load(data)
        tokens = np.split(arrays["tokens"], arrays["token_ends"])[: entry.clips]
        texts = [t.tobytes().decode() for t in np.split(arrays["text"], arrays["text_ends"])]
        guesses: Sequence[Guesses | None] = [None] * entry.clips
        if "guessed_ids" in arrays:
            cuts = [np.split(arrays[f"guessed_{n}"], arrays["token_ends"]) for n in NAMES]
            guesses = [Guesses(*own) for own in zip(*cuts, strict=True)][: entry.clips]
        rows = zip(texts[: entry.clips], tokens, arrays["vectors"], guesses, strict=True)
        heard = [Heard(*row) for row in rows]
        return Recording(entry.digest, entry.name, entry.seconds, arrays["times"], heard)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}): it was damaged or changed; index "
            f"{entry.name} again"
        ) from None

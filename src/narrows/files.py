"""Writing files so that none is ever lost or left half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from narrows.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to; once the block has ended well it takes ``path``'s
    place, else it is removed and ``path`` stays as it was. Readers see the old file or the new one.

    Raises InputError if the disk refuses.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path}: {told}") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)

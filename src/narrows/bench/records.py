"""One measurement of one item with one method, and the file that remembers them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from narrows.errors import InputError
from narrows.files import replacing

Key = tuple[str, str, str, str, str, str, int]


@dataclass(frozen=True, slots=True)
class Record:
    """``content`` is the digest of the item's texts, ``nll`` is in nats per answer token,
    ``seconds`` what compressing took; ``survived`` and ``score`` are None where they do not apply
    or were not asked for."""

    model: str
    dtype: str
    seed: int
    task: str
    item: str
    content: str
    group: str
    method: str
    budget: str
    requested: int
    kept: int
    context_tokens: int
    prompt_tokens: int
    seconds: float
    nll: float
    survived: bool | None
    score: float | None = None
    prediction: str | None = None

    @property
    def key(self) -> Key:
        """What makes it the same measurement."""
        return (
            self.model,
            self.dtype,
            self.item,
            self.content,
            self.method,
            self.budget,
            self.seed,
        )


class Ledger:
    """Records by key, appended to a JSON Lines file as they are made, so that a run that was cut
    off goes on where it stopped.

    Args:
        path: the file; None keeps records in memory only. A last line cut short is dropped.

    Raises InputError if the file holds something else or cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._records: dict[Key, Record] = {}
        if path is not None and path.exists():
            for record in _read(path):
                self._records[record.key] = record

    def get(self, key: Key) -> Record | None:
        """The record with that key, if it has been made."""
        return self._records.get(key)

    def add(self, records: Iterable[Record]) -> None:
        """Remember records, replacing older ones of the same key."""
        new = list(records)
        self._records.update((r.key, r) for r in new)
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in new)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None


def _read(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the writer was cut off; the next record must start a line
            with replacing(path) as beside:
                beside.write_text(whole, encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a file of this benchmark: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(whole.split("\n")[:-1], 1):
        try:
            values: dict[str, Any] = json.loads(line)
            records.append(Record(**values))
        except (json.JSONDecodeError, TypeError):
            raise InputError(f"{path}, line {number}: not a record of this benchmark") from None
    return records

"""A progress bar on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console


class Progress:
    """Counts work done; grows when more is expected. Invisible where nobody watches."""

    def __init__(self, what: str, *, visible: bool = True) -> None:
        self._bar = progress.Progress(
            *progress.Progress.get_default_columns(),
            progress.TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not visible,
        )
        self._task = self._bar.add_task(what, total=0)
        self._total = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def expect(self, count: float) -> None:
        """There will be ``count`` more."""
        self._total += count
        self._bar.update(self._task, total=self._total)

    def advance(self, count: float = 1) -> None:
        """``count`` are done."""
        self._bar.advance(self._task, count)

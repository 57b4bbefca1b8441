"""What is compared: compression methods with their options, and the budgets they are given."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from narrows.bench.tasks import Item
from narrows.compression import make_compressor
from narrows.compression.units import tokenize
from narrows.contracts import Compressor
from narrows.errors import BudgetError
from narrows.model.flat import FlatModel
from narrows.registry import split_spec

FULL, NONE = "full", "none"
"""The two ends every method lies between: the whole context, and no context."""

QUESTION_AWARE = ("extractive",)


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a context may be kept: a share (``keep``) or a count of tokens."""

    keep: float | None = None
    tokens: int | None = None

    def of(self, context_tokens: int) -> int:
        """Tokens to keep of a context of that many; never 0."""
        if self.tokens is not None:
            return min(self.tokens, context_tokens)
        return max(1, round((1.0 if self.keep is None else self.keep) * context_tokens))

    @property
    def label(self) -> str:
        """``"0.2"``, ``"2000 tokens"`` or, for the ends, ``"-"``."""
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        return "-" if self.keep is None else f"{self.keep:g}"


@dataclass(frozen=True, slots=True)
class Shortened:
    """One compressed context. ``kept`` and ``requested`` count tokens of the source."""

    text: str
    requested: int
    kept: int
    context_tokens: int
    seconds: float


class Arm:
    """One method, under the spec that names it: ``dac``, ``dac:stages=5,alpha=0.5``, and the
    ends ``full`` and ``none``. Remembers what it made of a context.

    Raises ConfigError for a malformed spec, an unknown method or option.
    """

    def __init__(self, spec: str, model: FlatModel) -> None:
        self.spec = spec
        self.model = model
        self.method, options = parse_spec(spec)
        self._compressor: Compressor | None = None
        if self.method not in (FULL, NONE):
            self._compressor = make_compressor(self.method, model, **options)
        self._made: dict[tuple[str, str | None, Budget], Shortened] = {}

    @property
    def is_end(self) -> bool:
        """Whether this is ``full`` or ``none``, which take no budget."""
        return self._compressor is None

    def shorten(self, item: Item, budget: Budget) -> Shortened:
        """The item's context within ``budget``. Raises BudgetError if the method kept more."""
        question = item.question if self.method in QUESTION_AWARE else None
        key = (item.context, question, budget)
        if key not in self._made:
            self._made[key] = self._shorten(item.context, question, budget)
        return self._made[key]

    def _shorten(self, context: str, question: str | None, budget: Budget) -> Shortened:
        count = len(tokenize(context, self.model.tokenizer).ids)
        if self._compressor is None:
            kept, text = (count, context) if self.method == FULL else (0, "")
            return Shortened(text, kept, kept, count, 0.0)
        requested = budget.of(count)
        started = time.perf_counter()
        made = self._compressor.compress(context, target_tokens=requested, question=question)
        seconds = time.perf_counter() - started
        if made.tokens > requested:
            raise BudgetError(
                f"method {self.spec!r} kept {made.tokens} tokens of a budget of {requested}; "
                "its results cannot be compared"
            )
        return Shortened(made.text, requested, made.tokens, count, seconds)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """``name:option=value,...`` as the name and typed options (numbers, true, false, text)."""
    name, options = split_spec("method", spec)
    return name, {key: _typed(value) for key, value in options.items()}


def _typed(value: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value

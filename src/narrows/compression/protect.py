"""Text that must survive compression, resolved on the source before anything is scored.

``protect`` is one item or a sequence of them:

- ``"@name"``: a named class (``@digits``) or a preset (``@math``), see CLASSES and PRESETS;
- any other string: that literal text, everywhere it occurs (``"@@home"`` is the text ``@home``);
- a compiled pattern of ``re`` or ``regex``: every match;
- a pair ``(start, end)``: characters of this text;
- an integer: every token with that id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from numpy.typing import NDArray

from narrows.compression.units import TokenizedText, Units
from narrows.errors import ConfigError

if TYPE_CHECKING:
    from narrows.contracts import Span

ProtectItem = Any
"""A string, a compiled pattern, a ``(start, end)`` pair or a token id."""

CLASSES: dict[str, regex.Pattern[str]] = {
    # numbers with their sign, separators and per cent sign
    "digits": regex.compile(r"(?:(?<![\p{L}\p{N}])[-+−])?\p{N}+(?:[.,:/]\p{N}+)*%?"),
    "newlines": regex.compile(r"\R+"),
    "punct": regex.compile(r"\p{P}+"),
    "urls": regex.compile(r"""\b(?:(?:https?|ftp)://|www\.)[^\s<>"'\])]*[^\s<>"'\]).,;:!?]"""),
    # a fence left open runs to the end
    "code_fences": regex.compile(r"(?ms)^[ \t]*(```+|~~~+).*?(?:^[ \t]*\1[ \t]*$|\Z)"),
    # English words and the Chinese negating characters
    "negations": regex.compile(
        r"(?i)\b(?:no|not|nor|none|never|neither|nothing|nobody|nowhere|cannot|without|unless"
        r"|except|\p{L}+n['’]t)\b|[不没沒無无非未否勿莫]"
    ),
    # single quotes are left out: they are mostly apostrophes
    "quoted": regex.compile(
        r'"[^"\n]{1,1000}"|“[^”]{1,1000}”|«[^»]{1,1000}»|「[^」]{1,1000}」|『[^』]{1,1000}』'
    ),
}

PRESETS: dict[str, tuple[ProtectItem, ...]] = {
    "math": ("@digits", "@newlines", regex.compile(r"[-+*×/÷=<>%$]"), "The answer is"),
    "qa": ("@newlines", regex.compile(r"[.?!。？！]")),
    "code": ("@code_fences", regex.compile(r"\R+[ \t]*"), regex.compile(r"[()\[\]{}]")),
    "chat": ("@code_fences", "@urls", "@negations", "@quoted"),
}


class Protection:
    """A checked ``protect`` option. Raises ConfigError for an item it cannot understand."""

    def __init__(self, protect: ProtectItem | Sequence[ProtectItem] = ()) -> None:
        self._patterns: list[re.Pattern[str] | regex.Pattern[str]] = []
        self._spans: list[Span] = []
        self._ids: set[int] = set()
        single = isinstance(protect, str | int | re.Pattern | regex.Pattern)
        for item in [protect] if single else protect:
            self._add(item)

    def forced(self, tokens: TokenizedText, units: Units) -> NDArray[np.bool_]:
        """Units that must be kept, bool ``[units]``: all that hold a protected character or
        token. Raises ConfigError for a span outside the text."""
        n = len(tokens.ids)
        held = np.zeros(n, dtype=bool)
        ends = np.asarray([end for _, end in tokens.spans], dtype=np.int64)
        starts = np.asarray([start for start, _ in tokens.spans], dtype=np.int64)
        for a, b in self._find(tokens.text):
            # tokens that end after a and start before b; spans are sorted, so these are a range
            held[np.searchsorted(ends, a, side="right") : np.searchsorted(starts, b)] = True
        if self._ids:
            held |= np.isin(np.asarray(tokens.ids, dtype=np.int64), sorted(self._ids))
        return np.logical_or.reduceat(held, units.bounds[:-1]) if n else held

    def describe(self) -> list[str | int]:
        """What is protected, in plain values that tell two protections apart."""
        patterns = (f"{pattern.pattern}/{int(pattern.flags)}" for pattern in self._patterns)
        return [*patterns, *(f"{a}:{b}" for a, b in self._spans), *sorted(self._ids)]

    def _find(self, text: str) -> Iterator[Span]:
        for pattern in self._patterns:
            yield from (match.span() for match in pattern.finditer(text) if match.group())
        for a, b in self._spans:
            if b > len(text):
                raise ConfigError(
                    f"protect: span {a}:{b} lies outside the text of {len(text)} characters"
                )
            if a < b:
                yield a, b

    def _add(self, item: ProtectItem) -> None:
        match item:
            case str() if item.startswith("@") and not item.startswith("@@"):
                self._add_named(item[1:])
            case str() if item:
                self._patterns.append(re.compile(re.escape(item.removeprefix("@"))))
            case re.Pattern() | regex.Pattern() if isinstance(item.pattern, str):
                self._patterns.append(item)
            case bool():
                raise ConfigError(f"protect: {item!r} is neither text, a span nor a token id")
            case int() if item >= 0:
                self._ids.add(item)
            case (int(a), int(b)) if 0 <= a <= b:
                self._spans.append((a, b))
            case _:
                raise ConfigError(
                    f"protect: cannot use {item!r}; give text, '@name', a compiled text pattern, "
                    "a (start, end) pair of character positions or a token id"
                )

    def _add_named(self, name: str) -> None:
        if name in CLASSES:
            self._patterns.append(CLASSES[name])
        elif name in PRESETS:
            for item in PRESETS[name]:
                self._add(item)
        else:
            choices = ", ".join(f"@{known}" for known in (*CLASSES, *PRESETS))
            raise ConfigError(
                f"protect: unknown name '@{name}' (known: {choices}; literal text: '@@{name}')"
            )

"""Token ids to text, piece by piece, and the strings that end it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the bytes of a character that is not whole (yet)."""

WINDOW = 8
"""Tokens decoded with each new one. The context matters: many decoders strip a leading space,
and a character may span up to four tokens."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class StreamDecoder:
    """Text of one growing sequence, given out as soon as it can no longer change.

    Without a stop, the pieces joined are ``tokenizer.decode`` of all tokens (without its clean-up
    of spaces, which rewrites text already given out). Each push decodes a window of the newest
    tokens, so its cost does not grow with the length of the text.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stop: strings that end the text and are left out of it. The one completed first wins,
            the longest if several are: what a reader of single characters would do, however
            they fell into tokens.
        skip_special_tokens: leave special tokens out of the text.
        min_tokens: stop strings are looked for in the text after this many tokens only.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        *,
        min_tokens: int = 0,
    ) -> None:
        self.stopped = False
        # Asked twice for every token, so without what transformers wraps around it.
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = tuple(stop)
        self._skip = skip_special_tokens
        self._special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._unstoppable = min_tokens
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that are final and passed on
        self._held = ""  # final text that may be the beginning of a stop string
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Add one token; the text that is now final. Nothing more comes after a stop."""
        if self.stopped:
            return ""
        self._unstoppable -= 1
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None or (self._skip and token_id in self._special):
            return ""
        self._window.append(token_id)
        # A run of byte tokens decodes as a whole, to replacement characters throughout if any
        # part of it is no text: so nothing of it is final before the run ends.
        if _BYTE.fullmatch(piece):
            return ""
        return self._give(self._new_text(last=False), last=False)

    def flush(self) -> str:
        """The text held back so far; call once, after the last token."""
        return "" if self.stopped else self._give(self._new_text(last=True), last=True)

    def _new_text(self, last: bool) -> str:
        """The final but not yet given part of the window's text; shortens the window."""
        text = self._decode(self._window)
        end = len(text) - (not last and text.endswith(UNFINISHED))
        new = text[self._given : end]
        self._given = end
        if len(self._window) > 2 * WINDOW:
            # What may still change are the last three bytes at most, so they are all in the
            # tail; should its cut fall inside a character, that one has been given out.
            self._window = self._window[-WINDOW:]
            self._given += len(self._decode(self._window)) - len(text)
        return new

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text

    def _give(self, new: str, last: bool) -> str:
        """Pass ``new`` on up to a stop string, or to what may become one unless ``last``."""
        text = self._held + new
        stops = self._stop if self._unstoppable < 0 else ()
        ends = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
        if ends:
            self.stopped = True
            cut = min(ends)[1]
        else:
            cut = len(text) if last else len(text) - _overlap(text, stops)
        self._held = text[cut:]
        self._pieces.append(text[:cut])
        return text[:cut]


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stops):
            return n
    return 0

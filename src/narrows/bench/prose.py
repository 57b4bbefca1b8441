"""Plain English prose as token ids: public speeches."""

from __future__ import annotations

from pathlib import Path

from narrows.bench.data import find, read_rows
from narrows.compression.units import TokenizedText, tokenize
from narrows.errors import InputError
from narrows.model.flat import FlatModel


def read_prose(data: Path, model: FlatModel, tokens: int) -> TokenizedText:
    """The first ``tokens`` tokens of the speeches, one after the other. Raises InputError if
    there are fewer."""
    text = ""
    for row in read_rows(find(data, "state_union/speeches")):
        text += row["text"] + "\n"
        if len(text) < 3 * tokens:  # English has more characters a token; do not count each time
            continue
        whole = tokenize(text, model.tokenizer)
        if len(whole.ids) >= tokens:
            return tokenize(text[: whole.spans[tokens - 1][1]], model.tokenizer)
    raise InputError(f"the speeches in {data} have fewer than {tokens} tokens")

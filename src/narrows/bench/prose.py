"""Plain English prose as token ids: public speeches, encyclopaedia articles."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from narrows.compression.units import TokenizedText, tokenize
from narrows.data import find, read_rows
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


SOURCES = ("state_union/speeches", "wikitext2/articles")
"""Where windows of text come from, in turn."""


def read_windows(
    data: Path,
    model: FlatModel,
    count: int,
    tokens: int,
    seed: int = 0,
    sources: Sequence[str] = SOURCES,
    least: int | None = None,
) -> list[list[int]]:
    """``count`` runs of ``tokens`` token ids, each from another document, taken from ``sources``
    in turn and starting at a random place; fewer, but ``least`` (None: count), if there are too few
    documents that are long enough. Raises InputError if there are fewer still."""
    least = count if least is None else least
    chance = random.Random(seed)
    found: list[list[list[int]]] = []
    for source in sources:
        texts = [row["text"] for row in read_rows(find(data, source))]
        chance.shuffle(texts)
        runs: list[list[int]] = []
        for text in texts:
            if len(runs) == count:
                break
            ids: list[int] = model.tokenizer(text, verbose=False)["input_ids"]
            if len(ids) >= tokens:
                start = chance.randrange(len(ids) - tokens + 1)
                runs.append(ids[start : start + tokens])
        found.append(runs)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*found))
    windows = [run for run in turns if run is not None][:count]
    if len(windows) < least:
        raise InputError(
            f"{data} has only {len(windows)} texts of at least {tokens} tokens, not {least}; "
            "ask for fewer or shorter windows"
        )
    return windows

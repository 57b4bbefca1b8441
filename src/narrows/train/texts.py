"""Running text as windows of token ids, for calibration and training."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from narrows.config import SamplingParams
from narrows.data import find, locate, read_rows
from narrows.errors import InputError
from narrows.llm import LLM
from narrows.train.kept import kept as kept_tensors

PLAIN = (".txt", ".md")
ROWS = (".jsonl", ".jsonl.gz")

SOURCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "wiki_passages/passages": lambda row: f"{row['title']}\n{row['text']}",
    "lost_in_the_middle/nq_open_oracle": lambda row: f"{row['gold_title']}\n{row['gold_text']}",
    "xquad_en/xquad_en": lambda row: f"{row['context']}\n{row['question']} {row['answers'][0]}",
    "gsm8k/train": lambda row: f"{row['question']}\n{row['answer']}",
    "longbench/gov_report": lambda row: str(row["context"]),
    "longbench/narrativeqa": lambda row: str(row["context"])[:100_000],
    "longbench/lcc": lambda row: str(row["context"]),
    "leval/multidoc_qa": lambda row: str(row["context"]),
    "leval/legal_contract_qa": lambda row: str(row["context"])[:100_000],
    "tinyshakespeare/text": lambda row: str(row["text"])[:300_000],
}
"""Parts of the benchmark data from which no perplexity is measured, and the text of a row."""


def gather(
    source: str, llm: LLM, length: int, count: int, *, data: Path | None = None, seed: int = 0
) -> list[list[int]]:
    """Up to ``count`` windows of ``length`` token ids of a ``source``: ``own`` for text that the
    model writes, ``data`` for the data folder's (see ``narrows.data.locate``), or a file or folder
    of text. Raises InputError."""
    if length > llm.model.shape.max_tokens:
        raise InputError(
            f"windows of {length} tokens exceed the {llm.model.shape.max_tokens} that "
            f"{llm.model.name} takes"
        )
    if source == "own":
        return own(llm, count, length, seed)
    path = Path(source)
    if source != "data" and not path.exists():
        raise InputError(
            f"no text in {source!r}: it is neither own, nor data, nor a file or folder"
        )
    texts = from_data(locate(data)) if source == "data" else from_path(path)
    return windows(texts, llm.model.tokenizer, length, count, seed)


def from_data(folder: Path) -> Iterator[str]:
    """The texts of the data folder's SOURCES. Raises InputError where one is missing."""
    for name, make in SOURCES.items():
        yield from (make(row) for row in read_rows(find(folder, name)))


def from_path(path: Path) -> Iterator[str]:
    """The texts of a plain text or JSON Lines file (field ``text``), or of all such files in a
    folder. Raises InputError for one without text."""
    files = sorted(p for p in path.rglob("*") if p.name.endswith(PLAIN + ROWS))
    found = False
    for file in files if path.is_dir() else [path]:
        for text in _texts(file):
            if text.strip():
                found = True
                yield text
    if not found:
        raise InputError(f"{path} holds no text; give {', '.join(PLAIN + ROWS)} files")


def _texts(file: Path) -> Iterator[str]:
    if file.name.endswith(ROWS):
        for number, row in enumerate(read_rows(file), 1):
            if not isinstance(row.get("text"), str):
                raise InputError(f"{file}, row {number}: no field text")
            yield row["text"]
        return
    try:
        yield file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file} as text: {error}") from None


def own(llm: LLM, windows: int, length: int, seed: int = 0) -> list[list[int]]:
    """``windows`` texts of ``length`` tokens that the model itself writes, at temperature 1. One
    with a chat template writes every other as a chat, the user's part too, from the template's
    opening of it (as Magpie does, arXiv 2406.08464)."""
    starts = _starts(llm)
    requests = [
        llm.submit(
            start,
            SamplingParams(
                max_tokens=length - len(start),
                temperature=1.0,
                ignore_eos=True,
                seed=seed * 10**6 + number,
            ),
        )
        for number, start in zip(range(windows), itertools.cycle(starts), strict=False)
    ]
    for _ in llm.engine.run():
        pass
    return [list(request.tokens) for request in requests]


def _starts(llm: LLM) -> list[list[int]]:
    """What the model's own texts begin with, in turn."""
    tokenizer, mark = llm.model.tokenizer, "\x00"
    begin = tokenizer.bos_token_id
    starts = [[sorted(llm.model.eos_ids)[0] if begin is None else int(begin)]]
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
        opening = chat.partition(mark)[0]
        starts.append(tokenizer(opening, add_special_tokens=False)["input_ids"])
    return starts


def windows(
    texts: Iterable[str], tokenizer: Any, length: int, most: int, seed: int = 0
) -> list[list[int]]:
    """Up to ``most`` windows of ``length`` token ids: the texts in random order one after the
    other, an end-of-text between, cut and shuffled. Raises InputError if there is not one."""
    chance = random.Random(seed)
    order = list(texts)
    chance.shuffle(order)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for text in order:
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end]
        if len(stream) >= most * length:
            break
    made = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)][:most]
    if not made:
        raise InputError(f"the text has only {len(stream)} tokens, not the {length} of a window")
    chance.shuffle(made)
    return made


def kept(path: Path, origin: str, make: Callable[[], list[list[int]]]) -> list[list[int]]:
    """What ``make`` gives, windows of equal length, see ``train.kept``."""
    found = kept_tensors(path, origin, lambda: {"tokens": torch.tensor(make(), dtype=torch.int32)})
    windows: list[list[int]] = found["tokens"].tolist()
    return windows


def digest(windows: Iterable[Iterable[int]]) -> str:
    """Sixteen hexadecimal digits that tell lists of windows apart."""
    return hashlib.sha256(repr([list(w) for w in windows]).encode()).hexdigest()[:16]

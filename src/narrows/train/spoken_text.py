"""What is spoken to train and test a recogniser: short stretches of the data folder's texts.

Stretches of one to a few sentences, numbers in words (sheet section 11), some with a question that
they answer. Whole articles are held out, never single stretches.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from narrows.data import find, read_rows
from narrows.errors import ConfigError

LEAST, MOST = 5, 36
"""Words of a stretch; 36 are about 15 seconds."""
HELD_OUT = 3
"""One in so many of the articles with questions is held out."""

_NUMBER = re.compile(r"(\$|£|€)?(\d[\d,]*(?:\.\d+)?)(st|nd|rd|th|s)?\b(%)?")
_MONEY = {"$": "dollars", "£": "pounds", "€": "euros"}
_SIGNS = {"%": " percent", "&": " and ", "+": " plus ", "=": " equals ", "@": " at "}


@dataclass(frozen=True, slots=True)
class Stretch:
    """``text`` to be spoken as it stands; ``question`` is answered by it, and may be empty.
    ``article`` is where it comes from; ``held`` ones are for tests."""

    text: str
    article: str
    question: str
    held: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A stretch of an ``article`` and all ``questions`` it answers, each with its right answers;
    there may be none."""

    text: str
    article: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]
    held: bool


def stretches(data: Path, seed: int = 0) -> list[Stretch]:
    """Every stretch once, in an order of ``seed``. Raises InputError, see ``narrows.data``."""
    found = [*_asked(data), *_told(data)]
    held = {one.article for one in found if one.held}
    unique = {one.text: one for one in found if one.held or one.article not in held}
    listed = list(unique.values())
    random.Random(seed).shuffle(listed)
    return listed


def held_out(title: str) -> bool:
    """Whether an article with questions is held out, by its title, however it is written."""
    return hashlib.sha256(_titled(title).encode()).digest()[0] % HELD_OUT == 0


def words_of(text: str) -> str:
    """``text`` in lower case, its words divided by single spaces, without punctuation but for the
    apostrophes within words."""
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower()))


def verbalised(text: str) -> str:
    """``text`` with numbers and signs in words, without accents and without what is not spoken."""
    plain = unicodedata.normalize("NFKD", text.replace("’", "'"))
    plain = _NUMBER.sub(_in_words, plain.encode("ascii", "ignore").decode())
    for sign, word in _SIGNS.items():
        plain = plain.replace(sign, word)
    plain = re.sub(r"[^A-Za-z.,;:!?' ]+", " ", plain)
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(plain.split()))


def cut(text: str) -> Iterator[str]:
    """Stretches of ``text``: whole sentences together while they are short, parts of those that
    are long."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        found = sentence.split()
        if len(kept) + len(found) > MOST:
            yield " ".join(kept)
            kept = []
        while len(found) > MOST:
            yield " ".join(found[:MOST])
            found = found[MOST:]
        kept += found
    yield " ".join(kept)


def asked(data: Path) -> Iterator[Asked]:
    """The stretches of texts that questions are asked about. A question is answered by the first
    stretch of its text that holds an answer word for word. Raises InputError, see
    ``narrows.data``."""
    spoken = {row["pid"]: row for row in read_rows(find(data, "spoken_squad/passages"))}
    rows = []
    for row in read_rows(find(data, "spoken_squad/questions")):
        passage = spoken[row["pid"]]
        rows.append((passage["title"], passage["asr_wer23"], row["question"], row["answers"]))
    for row in read_rows(find(data, "xquad_en/xquad_en")):
        rows.append((row["title"], row["context"], row["question"], row["answers"]))
    for row in read_rows(find(data, "lost_in_the_middle/nq_open_oracle")):
        rows.append((row["gold_title"], row["gold_text"], row["question"], row["answers"]))
    texts: dict[tuple[str, str], list[tuple[str, tuple[str, ...]]]] = {}
    for title, text, question, answers in rows:
        texts.setdefault((title, text), []).append((question, tuple(map(str, answers))))
    for (title, text), questions in texts.items():
        pieces = list(_spoken(text))
        matched: list[list[tuple[str, tuple[str, ...]]]] = [[] for _ in pieces]
        for question, answers in questions:
            wanted = [words_of(verbalised(answer)) for answer in answers]
            for piece, found in zip(pieces, matched, strict=True):
                padded = f" {words_of(piece)} "
                if any(answer and f" {answer} " in padded for answer in wanted):
                    found.append((question, answers))
                    break
        for piece, found in zip(pieces, matched, strict=True):
            yield Asked(piece, _titled(title), tuple(found), held_out(title))


def _asked(data: Path) -> Iterator[Stretch]:
    """The same, each with the first of its questions."""
    for one in asked(data):
        first = one.questions[0][0] if one.questions else ""
        yield Stretch(one.text, one.article, first, one.held)


def _told(data: Path) -> Iterator[Stretch]:
    """Stretches of other texts. In an encyclopaedia the one before stands for a question."""
    for row in read_rows(find(data, "wiki_passages/passages")):
        before = ""
        for piece in _spoken(row["text"]):
            yield Stretch(piece, _titled(row["title"]), before, False)
            before = piece
    for row in read_rows(find(data, "state_union/speeches")):
        for piece in _spoken(row["text"]):
            yield Stretch(piece, row["id"], "", False)


def _spoken(text: str) -> Iterator[str]:
    for piece in cut(verbalised(text)):
        if len(piece.split()) >= LEAST:
            yield piece


def _titled(title: str) -> str:
    return " ".join(title.replace("_", " ").casefold().split())


def _in_words(match: re.Match[str]) -> str:
    try:
        from num2words import num2words
    except ImportError:
        raise ConfigError("saying numbers needs num2words: pip install 'narrows[listen]'") from None
    money, digits, ending, percent = match.groups()
    plain = digits.replace(",", "").rstrip(".")
    whole = plain.isdigit()
    if whole and len(plain) > 9:
        words = " ".join(num2words(int(d)) for d in plain)
    elif whole and ending in ("st", "nd", "rd", "th"):
        words = num2words(int(plain), to="ordinal")
    elif whole and not money and "," not in digits and 1100 <= int(plain) <= 2099:
        words = num2words(int(plain), to="year")
    else:
        words = num2words(int(plain) if whole else float(plain))
    if ending == "s":
        words = f"{words[:-1]}ies" if words.endswith("y") else f"{words}s"
    after = [_MONEY[money]] if money else ["percent"] if percent else []
    return " ".join([" ", words, *after, ""])

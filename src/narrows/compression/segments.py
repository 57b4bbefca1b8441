"""Prompts in parts: an instruction, contexts and a question; or the messages of a chat.

All parts that are compressed share one budget: they are joined, with the separators protected,
so that one selection decides over all of them, and then taken apart again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from narrows.compression.base import UnitCompressor, resolve_budget
from narrows.contracts import CompressedPrompt, Span
from narrows.errors import BudgetError, ConfigError, InputError

SEPARATOR = "\n\n"

BudgetScope = Literal["contexts", "prompt"]


@dataclass(frozen=True, slots=True)
class Context:
    """One context of a prompt. ``compress`` False keeps it verbatim, within the shared budget;
    ``keep_ratio`` compresses it alone, to that share, and takes what is kept off the budget."""

    text: str
    compress: bool = True
    keep_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class SegmentedPrompt:
    """A prompt in parts. ``kept[i]`` are the spans of the original context ``i`` whose
    concatenation is ``contexts[i]``; ``results`` the selections made, the shared one first.
    ``tokens`` and ``original_tokens`` count what the budget was for."""

    instruction: str
    contexts: tuple[str, ...]
    question: str
    kept: tuple[tuple[Span, ...], ...]
    tokens: int
    original_tokens: int
    separator: str
    results: tuple[CompressedPrompt, ...]

    @property
    def text(self) -> str:
        """All parts that are not empty, in order, joined by the separator."""
        parts = (self.instruction, *self.contexts, self.question)
        return self.separator.join(part for part in parts if part)


def compress_prompt(
    compressor: UnitCompressor,
    contexts: Sequence[str | Context],
    *,
    instruction: str = "",
    question: str = "",
    target_tokens: int | None = None,
    keep_ratio: float | None = None,
    budget_scope: BudgetScope = "contexts",
    separator: str = SEPARATOR,
) -> SegmentedPrompt:
    """Compress the ``contexts`` of a prompt; instruction and question stay verbatim.

    The budget (exactly one of ``target_tokens`` and ``keep_ratio``; none if every context has
    its own ratio) is for the contexts. With ``budget_scope`` "prompt" it is for instruction and
    question too, each counted by itself with a separator.

    Raises ConfigError for a bad option, BudgetError if verbatim parts leave nothing of it.
    """
    if budget_scope not in get_args(BudgetScope):
        raise ConfigError(f"budget_scope {budget_scope!r} is not one of contexts, prompt")
    parts = [Context(c) if isinstance(c, str) else c for c in contexts]
    alone = {
        i: compressor.compress(part.text, keep_ratio=part.keep_ratio, question=question or None)
        for i, part in enumerate(parts)
        if part.compress and part.keep_ratio is not None
    }
    shared = [i for i in range(len(parts)) if i not in alone]
    frame = [p + separator for p in (instruction, question) if p and budget_scope == "prompt"]
    framed = sum(map(compressor.count, frame))
    spent = framed + sum(map(_tokens, alone.values()))
    original = framed + sum(compressor.count(parts[i].text) for i in alone)
    results = list(alone.values())
    kept = {i: result.kept for i, result in alone.items()}
    if shared or not alone:
        joined = _Joined([parts[i].text for i in shared], separator)
        original += compressor.count(joined.text)
        left = resolve_budget(original, target_tokens, keep_ratio) - spent
        verbatim = [k for k, i in enumerate(shared) if not parts[i].compress]
        result = joined.compress(compressor, left, question, verbatim)
        kept.update(zip(shared, joined.take_apart(result), strict=True))
        results.insert(0, result)
        spent += _tokens(result)
    elif target_tokens is not None or keep_ratio is not None:
        raise ConfigError("every context has its own keep_ratio; leave the prompt's budget out")
    return SegmentedPrompt(
        instruction=instruction,
        contexts=tuple(_cut(part.text, kept[i]) for i, part in enumerate(parts)),
        question=question,
        kept=tuple(kept[i] for i in range(len(parts))),
        tokens=spent,
        original_tokens=original,
        separator=separator,
        results=tuple(results),
    )


def compress_messages(
    compressor: UnitCompressor,
    messages: Sequence[Mapping[str, Any]],
    *,
    target_tokens: int | None = None,
    keep_ratio: float | None = None,
    question: str | None = None,
    roles: Sequence[str] = ("user", "assistant", "tool"),
    keep_last_user: bool = True,
) -> tuple[list[dict[str, Any]], CompressedPrompt]:
    """Compress the contents of chat messages with one of ``roles``, never a template's tokens.

    The last user message stays verbatim unless ``keep_last_user`` is False, and is then the
    ``question`` if none is given. The budget is for the compressed contents together, with a
    paragraph break between two. Returns new messages, all other keys as they were, and the
    selection over the joined contents. Raises InputError for contents that are not text.
    """
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=None)
    if not keep_last_user:
        last = None
    chosen = [i for i, m in enumerate(messages) if m.get("role") in roles and i != last]
    for i in [*chosen, *([] if last is None else [last])]:
        if not isinstance(messages[i].get("content"), str):
            raise InputError(f"message {i}: its content is not text; only text can be compressed")
    joined = _Joined([messages[i]["content"] for i in chosen], SEPARATOR)
    if question is None and last is not None:
        question = messages[last]["content"]
    budget = resolve_budget(compressor.count(joined.text), target_tokens, keep_ratio)
    result = joined.compress(compressor, budget, question)
    if not chosen:
        result.report["warnings"].append("no message was left to compress")
    shorter = [dict(message) for message in messages]
    for i, spans in zip(chosen, joined.take_apart(result), strict=True):
        shorter[i]["content"] = _cut(messages[i]["content"], spans)
    return shorter, result


class _Joined:
    """Parts end to end with a separator between, and the way back."""

    def __init__(self, parts: Sequence[str], separator: str) -> None:
        self.text = separator.join(parts)
        self.spans: list[Span] = []
        start = 0
        for part in parts:
            self.spans.append((start, start + len(part)))
            start += len(part) + len(separator)

    def compress(
        self,
        compressor: UnitCompressor,
        budget: int,
        question: str | None,
        verbatim: Sequence[int] = (),
    ) -> CompressedPrompt:
        """One selection over all parts; separators and ``verbatim`` parts are kept."""
        if budget < 1 and self.text:
            raise BudgetError(
                "verbatim parts of the prompt leave nothing of its budget; raise the budget, or "
                "leave instruction and question out of it"
            )
        separators = [(a, b) for (_, a), (b, _) in pairwise(self.spans)]
        return compressor.compress(
            self.text,
            target_tokens=max(budget, 1),
            question=question or None,
            protect=[*separators, *(self.spans[i] for i in verbatim)],
        )

    def take_apart(self, result: CompressedPrompt) -> list[tuple[Span, ...]]:
        """The kept spans of each part, in the part's own characters."""
        return [
            tuple(
                (max(a, start) - start, min(b, end) - start)
                for a, b in result.kept
                if max(a, start) < min(b, end)
            )
            for start, end in self.spans
        ]


def _cut(text: str, spans: Sequence[Span]) -> str:
    return "".join(text[a:b] for a, b in spans)


def _tokens(result: CompressedPrompt) -> int:
    """What a result costs, as its budget counted."""
    return result.tokens if result.target_tokens is None else result.target_tokens

"""The frame every compressor shares: text to units and a budget, chosen units back to text."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import numbers
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from narrows.compression.protect import Protection, ProtectItem
from narrows.compression.units import (
    Granularity,
    TokenizedText,
    Units,
    encode,
    make_units,
    tokenize,
)
from narrows.contracts import CompressedPrompt, Span
from narrows.errors import BudgetError, ConfigError, InputError

if TYPE_CHECKING:
    from narrows.model.flat import FlatModel

OnInfeasible = Literal["error", "keep_forced", "trim_forced"]

SEARCH_TRIES = 8
"""Selections tried to meet a budget stated in another tokenizer's tokens."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One text ready for choosing.

    ``forced`` bool ``[units]`` must all be kept; ``budget`` is the most tokens to keep, forced
    ones included, and is always more than they cost and less than the whole text.
    """

    tokens: TokenizedText
    units: Units
    forced: NDArray[np.bool_]
    budget: int

    @property
    def free(self) -> int:
        """Tokens of the budget that protected units leave over."""
        return self.budget - int(self.units.costs[self.forced].sum())


@dataclass(frozen=True, slots=True)
class Choice:
    """What a method chose: ``kept`` bool ``[units]``, its ``scores`` float64 ``[tokens]`` if it has
    any, and a ``report`` of JSON values (numpy values are converted, non-finite ones become
    None; a list under ``"warnings"`` joins the result's warnings)."""

    kept: NDArray[np.bool_]
    scores: NDArray[np.float64] | None = None
    report: dict[str, Any] = field(default_factory=dict)


class UnitCompressor(ABC):
    """A ``Compressor`` that keeps or drops units of text; a method only fills in ``choose``.

    Args:
        model: whose tokenizer counts, and which scores if the method needs one.
        tokenizer: used instead of the model's, for methods that need no model.
        protect: what must survive, see ``narrows.compression.protect``.
        granularity: the smallest thing kept or dropped.
        on_infeasible: what to do when protected text alone exceeds the budget: ``error`` raises
            BudgetError, ``keep_forced`` keeps all of it and nothing else (over budget),
            ``trim_forced`` keeps its first units that fit.
        target_tokenizer: count budgets with this (fast) tokenizer on the *output text*. Without
            it a budget counts kept tokens of the source, and re-encoding the output can give a
            few more or fewer.

    Raises ConfigError for an option it cannot use.
    """

    method: ClassVar[str]

    def __init__(
        self,
        model: FlatModel | None = None,
        *,
        tokenizer: Any = None,
        protect: ProtectItem | Sequence[ProtectItem] = (),
        granularity: Granularity = "token",
        on_infeasible: OnInfeasible = "error",
        target_tokenizer: Any = None,
    ) -> None:
        if tokenizer is None:
            tokenizer = model.tokenizer if model is not None else None
        if tokenizer is None:
            raise ConfigError(f"method {self.method!r} needs a model or a tokenizer")
        if on_infeasible not in get_args(OnInfeasible):
            choices = ", ".join(get_args(OnInfeasible))
            raise ConfigError(f"on_infeasible {on_infeasible!r} is not one of {choices}")
        make_units(TokenizedText("", [], []), granularity)  # refuses an unknown name now, not later
        self.tokenizer = tokenizer
        self.protection = Protection(protect)
        self.granularity = granularity
        self.on_infeasible = on_infeasible
        self.target_tokenizer = target_tokenizer

    @abstractmethod
    def choose(self, prepared: Prepared, question: str | None) -> Choice:
        """Units to keep: all forced ones, and no more than the budget in tokens."""

    def settings(self) -> dict[str, Any]:
        """The options that decide the result, as JSON values. Methods add their own."""
        return {
            "method": self.method,
            "protect": self.protection.describe(),
            "granularity": self.granularity,
            "on_infeasible": self.on_infeasible,
            "target_tokenizer": getattr(self.target_tokenizer, "name_or_path", None),
        }

    def count(self, text: str) -> int:
        """Tokens of ``text`` in the tokenizer that budgets count with."""
        tokenizer = self.target_tokenizer or self.tokenizer
        return len(encode(text, tokenizer)["input_ids"]) if text else 0

    def compress(
        self,
        text: str,
        *,
        target_tokens: int | None = None,
        keep_ratio: float | None = None,
        question: str | None = None,
        protect: ProtectItem | Sequence[ProtectItem] = (),
    ) -> CompressedPrompt:
        """Shorten ``text``; ``protect`` adds to the constructor's for this text only.

        A text already within the budget comes back unchanged and unscored. Otherwise the cost
        kept lies within one unit of the budget. Raises ConfigError for a bad budget, InputError
        for bad text, BudgetError as ``on_infeasible`` says.
        """
        started = time.perf_counter()
        if not isinstance(text, str):
            raise InputError(f"the text to compress must be a string, not {type(text).__name__}")
        tokens = tokenize(text, self.tokenizer)
        units = make_units(tokens, self.granularity)
        forced = self.protection.forced(tokens, units) | Protection(protect).forced(tokens, units)
        source = Prepared(tokens, units, forced, len(tokens.ids))
        original = self.count(text) if self.target_tokenizer else len(tokens.ids)
        requested = resolve_budget(original, target_tokens, keep_ratio)
        prepared = time.perf_counter()
        if original <= requested:
            choice = Choice(np.ones(len(units), dtype=bool))
        else:
            choice = self._within(source, requested, question)
        timings = {"prepare": prepared - started, "choose": time.perf_counter() - prepared}
        return self._result(source, choice, requested, timings)

    def _within(self, source: Prepared, requested: int, question: str | None) -> Choice:
        """A choice that measures at most ``requested``, unless protected text must exceed it."""
        needed = self._measure(source, source.forced)
        if needed > requested:
            return self._infeasible(source, requested, needed)
        if needed == requested:
            return Choice(source.forced)
        if self.target_tokenizer is None:
            return self._choose(source, requested, question)
        return self._search(source, requested, question)

    def _infeasible(self, source: Prepared, requested: int, needed: int) -> Choice:
        problem = f"protected text takes {needed} tokens of a budget of {requested}"
        if self.on_infeasible == "error":
            raise BudgetError(
                f"{problem}; raise the budget, protect less, or set on_infeasible to "
                "'keep_forced' or 'trim_forced'"
            )
        if self.on_infeasible == "keep_forced":
            return Choice(source.forced, report={"warnings": [f"{problem}; kept all of it"]})
        places = np.flatnonzero(source.forced)

        def first(n: int) -> NDArray[np.bool_]:
            kept = np.zeros(len(source.units), dtype=bool)
            kept[places[:n]] = True
            return kept

        fitting = bisect.bisect_right(
            range(len(places) + 1), requested, key=lambda n: self._measure(source, first(n))
        )
        return Choice(first(fitting - 1), report={"warnings": [f"{problem}; trimmed it to fit"]})

    def _search(self, source: Prepared, requested: int, question: str | None) -> Choice:
        """Look for the budget in our tokens whose output has ``requested`` target tokens.

        Tokens of the two tokenizers are nearly proportional, so each try scales the last one.
        Ends within one per cent below, or with the best that fitted in SEARCH_TRIES.
        """
        best, reached = Choice(source.forced), self._measure(source, source.forced)
        low, high = int(source.units.costs[source.forced].sum()), source.budget
        guess = source.budget * requested // self.count(source.tokens.text)
        tries = 0
        while tries < SEARCH_TRIES and high - low > 1 and reached < requested - requested // 100:
            tries += 1
            budget = min(max(guess, low + 1), high - 1)
            choice = self._choose(source, budget, question)
            measured = self._measure(source, choice.kept)
            guess = budget * requested // max(measured, 1)
            if measured > requested:
                high = budget
            else:
                low = budget
                if measured >= reached:
                    best, reached = choice, measured
        return replace(best, report={**best.report, "selections": tries})

    def _choose(self, source: Prepared, budget: int, question: str | None) -> Choice:
        """The method's choice, held to what it promises."""
        choice = self.choose(replace(source, budget=budget), question)
        cost = int(source.units.costs[choice.kept].sum())
        if cost > budget or (source.forced & ~choice.kept).any():
            raise RuntimeError(
                f"{self.method} kept {cost} of {budget} tokens, "
                f"{int((source.forced & ~choice.kept).sum())} protected units missing"
            )
        return choice

    def _measure(self, source: Prepared, kept: NDArray[np.bool_]) -> int:
        """Tokens of the kept units, as budgets count them."""
        if self.target_tokenizer is None:
            return int(source.units.costs[kept].sum())
        return self.count(_join(source.tokens.text, kept_spans(source.tokens, source.units, kept)))

    def _result(
        self, source: Prepared, choice: Choice, requested: int, timings: dict[str, float]
    ) -> CompressedPrompt:
        tokens, units = source.tokens, source.units
        spans = kept_spans(tokens, units, choice.kept)
        text = _join(tokens.text, spans)
        indices = np.flatnonzero(np.repeat(choice.kept, units.costs))
        settings = self.settings()
        report = _plain(choice.report)
        report["forced_tokens"] = int(units.costs[source.forced].sum())
        report["warnings"] = report.get("warnings", [])
        if tokens.text and not text:
            report["warnings"].append(f"nothing fits in {requested} tokens")
        report["timings"] = {**report.get("timings", {}), **timings}
        report["settings"] = settings
        report["fingerprint"] = fingerprint(settings)
        return CompressedPrompt(
            text=text,
            tokens=len(indices),
            original_tokens=len(tokens.ids),
            kept=tuple(spans),
            requested_tokens=requested,
            method=self.method,
            kept_token_indices=tuple(indices.tolist()),
            target_tokens=self.count(text) if self.target_tokenizer else None,
            scores=None if choice.scores is None else tuple(map(float, choice.scores)),
            report=report,
        )


def resolve_budget(original: int, target_tokens: int | None, keep_ratio: float | None) -> int:
    """The budget in tokens of a text of ``original`` tokens, at least 1; a ratio rounds down.

    Raises ConfigError unless exactly one is given: an integer of at least 1, or a ratio in (0, 1].
    """
    if (target_tokens is None) == (keep_ratio is None):
        raise ConfigError("give exactly one of target_tokens and keep_ratio")
    if target_tokens is not None:
        if not _is_number(target_tokens, numbers.Integral) or target_tokens < 1:
            raise ConfigError(f"target_tokens must be a whole number from 1, not {target_tokens!r}")
        return int(target_tokens)
    if not _is_number(keep_ratio, numbers.Real) or not 0 < float(keep_ratio or 0) <= 1:
        raise ConfigError(f"keep_ratio must be above 0 and at most 1, not {keep_ratio!r}")
    return max(1, math.floor(float(keep_ratio or 0) * original + 1e-9))  # 0.29 * 100 is 28.999…


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def kept_spans(tokens: TokenizedText, units: Units, kept: NDArray[np.bool_]) -> list[Span]:
    """Character spans of the kept units (bool ``[units]``), neighbours merged, none empty."""
    if kept.all():
        return [(0, len(tokens.text))] if tokens.text else []
    starts = [tokens.spans[t][0] for t in units.bounds[:-1]] + [len(tokens.text)]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(np.int8)))
    return [(starts[a], starts[b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def fingerprint(settings: dict[str, Any]) -> str:
    """A short name for settings: equal settings, equal name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _join(text: str, spans: list[Span]) -> str:
    return "".join(text[a:b] for a, b in spans)


def _plain(value: Any) -> Any:
    """``value`` with numpy turned to Python and non-finite numbers, which JSON lacks, to None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Shorter prompts: keep the tokens of a text that matter, in order, within a token budget.

``compress`` does it in one call; ``make_compressor`` builds a method to use many times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from narrows.errors import ConfigError
from narrows.registry import Registry

if TYPE_CHECKING:
    from narrows.compression.base import UnitCompressor
    from narrows.contracts import CompressedPrompt
    from narrows.model.flat import FlatModel

__all__ = ["METHODS", "compress", "make_compressor"]

METHODS: Registry[Callable[..., UnitCompressor]] = Registry("compression method")
"""Compressor factories by name; each takes ``(model, **options)``."""

for _name, _target in {
    "dac": "dac:dac",
    "dac-multiplicative": "dac:dac_multiplicative",
    "dac-static": "dac:dac_static",
    "dac-apart": "dac:dac_apart",
    "surprisal-dynamic": "dac:surprisal_dynamic",
    "dac-sweep": "sweep:DacSweep",
    "selective-context": "baselines:SelectiveContext",
    "random": "baselines:Random",
    "head": "baselines:TruncateHead",
    "tail": "baselines:TruncateTail",
    "head-tail": "baselines:TruncateMiddle",
    "llmlingua": "llmlingua:LLMLingua",
    "extractive": "extract:Extractive",
}.items():
    METHODS.add(_name, f"narrows.compression.{_target}")


def make_compressor(method: str, model: FlatModel | None = None, **options: Any) -> UnitCompressor:
    """The compressor called ``method`` on ``model``; methods that score nothing need only
    ``tokenizer=``. Raises ConfigError for an unknown method or an option it does not take."""
    factory = METHODS.get(method)
    try:
        return factory(model, **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ConfigError(f"method {method!r}: {str(error).partition(' ')[2]}") from None


def compress(
    text: str,
    *,
    target_tokens: int | None = None,
    keep_ratio: float | None = None,
    method: str = "dac",
    model: str | FlatModel = "smollm2-135m",
    question: str | None = None,
    protect: Any | Sequence[Any] = (),
    **options: Any,
) -> CompressedPrompt:
    """``text`` cut to ``target_tokens`` or to ``keep_ratio`` of its tokens (give exactly one).

    ``model`` scores, and its tokenizer counts: a name, kept loaded until another is asked for,
    or a loaded model. ``question`` matters only to question-aware methods. ``protect`` and the
    method's own ``options`` are described with ``narrows.compression.protect`` and the methods.
    Raises ConfigError, InputError, ModelError or BudgetError.
    """
    loaded = _load(model) if isinstance(model, str) else model
    compressor = make_compressor(method, loaded, protect=protect, **options)
    return compressor.compress(
        text, target_tokens=target_tokens, keep_ratio=keep_ratio, question=question
    )


@lru_cache(maxsize=1)
def _load(name: str) -> FlatModel:
    from narrows.model.flat import FlatModel

    return FlatModel.load(name)

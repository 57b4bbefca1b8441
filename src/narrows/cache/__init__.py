"""Caches: what is kept of the keys and values, one module a method."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrows.cache.hf import hf_cache

__all__ = ["hf_cache"]


def __getattr__(name: str) -> Any:
    # Lazy, so that using a cache does not import transformers' own.
    if name == "hf_cache":
        return importlib.import_module("narrows.cache.hf").hf_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Long-context LLM inference made cheap at every stage a token passes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrows import listen
    from narrows.compression import compress
    from narrows.config import SamplingParams
    from narrows.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "compress", "listen"]

_WHERE = {
    "LLM": "narrows.llm",
    "SamplingParams": "narrows.config",
    "compress": "narrows.compression",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the package does not import torch.
    if name == "listen":
        return importlib.import_module("narrows.listen")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

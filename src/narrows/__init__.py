"""Long-context LLM inference made cheap at every stage a token passes.

Converted models load through transformers' auto classes once this package has been imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrows import listen
    from narrows.compression import compress
    from narrows.config import SamplingParams
    from narrows.conversion import convert
    from narrows.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "compress", "convert", "listen"]

_WHERE = {
    "LLM": "narrows.llm",
    "SamplingParams": "narrows.config",
    "compress": "narrows.compression",
    "convert": "narrows.conversion",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the package does not import torch.
    if name == "listen":
        return importlib.import_module("narrows.listen")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MODELS = "narrows.model.latent"
"""Registers our model types with transformers when it is imported."""


class _Registering(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports _MODELS as soon as transformers is imported: to import both here would cost seconds
    whoever needs neither."""

    _theirs: importlib.abc.Loader

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._theirs, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._theirs.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._theirs.exec_module(module)
        if _MODELS not in sys.modules:  # else it is the one that imports transformers
            importlib.import_module(_MODELS)


if "transformers" in sys.modules:
    importlib.import_module(_MODELS)
else:
    sys.meta_path.insert(0, _Registering())

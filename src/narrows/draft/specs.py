"""From a spec string to a drafter: ``name`` or ``name:option=value,option=value``."""

from __future__ import annotations

from collections.abc import Callable

from narrows.contracts import Drafter
from narrows.registry import Registry, build

DRAFTERS: Registry[Callable[..., Drafter]] = Registry("drafter")
"""Name -> callable that takes the spec's options as keyword strings."""

DRAFTERS.add("lookup", "narrows.draft.lookup:lookup")

AUTO, NONE = "auto", "none"


def make_drafter(spec: str) -> Drafter | None:
    """The drafter ``spec`` names; None for "none". "auto" is the best there is for every model,
    prompt lookup. Raises ConfigError for an unknown name or option."""
    if spec == NONE:
        return None
    return build(DRAFTERS, "lookup" if spec == AUTO else spec)

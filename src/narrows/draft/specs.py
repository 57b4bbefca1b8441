"""From a spec string to a drafter: ``name``, ``name:option=value,option=value``, a folder, or
several of them joined by "+"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from narrows.contracts import Drafter
from narrows.draft.combined import Combined
from narrows.draft.specformer import SpecFormer
from narrows.draft.specformer_drafter import SpecFormerDrafter
from narrows.model.flat import FlatModel
from narrows.registry import Registry, build

DRAFTERS: Registry[Callable[..., Drafter]] = Registry("drafter")
"""Name -> callable that takes the target and the spec's options as keyword strings."""

DRAFTERS.add("lookup", "narrows.draft.lookup:lookup")
DRAFTERS.add("model", "narrows.draft.smaller:smaller_model")

AUTO, NONE = "auto", "none"


def make_drafter(spec: str, target: FlatModel) -> Drafter | None:
    """The drafter ``spec`` names for ``target``: None for "none", a trained SpecFormer for a
    folder, else a name with options; several joined by "+" are combined. "auto" is the best there
    is for every model, prompt lookup. Raises ConfigError for an unknown name or option, or a
    drafter of another model, ModelError for a folder that cannot be read."""
    if spec == NONE:
        return None
    if Path(spec).is_dir():
        return SpecFormerDrafter(SpecFormer.load(Path(spec)), target)
    parts = spec.split("+")
    if len(parts) > 1:
        made = [make_drafter(part, target) for part in parts]
        return Combined([one for one in made if one is not None])
    return build(DRAFTERS, "lookup" if spec == AUTO else spec, target)

"""From a spec string to a drafter: ``name``, ``name:option=value,option=value``, a folder, or
several of them joined by "+"."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from narrows.contracts import Drafter
from narrows.draft.combined import Combined
from narrows.model.flat import FlatModel
from narrows.model.saved import CONFIG
from narrows.registry import Registry, build

DRAFTERS: Registry[Callable[..., Drafter]] = Registry("drafter")
"""Name -> callable that takes the target and the spec's options as keyword strings."""

DRAFTERS.add("lookup", "narrows.draft.lookup:lookup")
DRAFTERS.add("phrases", "narrows.draft.phrases:phrases")
DRAFTERS.add("model", "narrows.draft.smaller:smaller_model")
TRAINED = "shipped"
DRAFTERS.add(TRAINED, "narrows.draft.specformer_drafter:trained")

AUTO, NONE = "auto", "none"
UNTRAINED, BEST = "lookup", f"lookup+phrases+{TRAINED}"
"""What "auto" stands for: without anything shipped for a model, and with it."""

SHIPPED = Path(__file__).with_name("shipped")
"""Holds a folder for each trained drafter that comes with the package, and its card."""


def make_drafter(spec: str, target: FlatModel) -> Drafter | None:
    """The drafter ``spec`` names for ``target``: None for "none", a trained SpecFormer for a
    folder, else a name with options; several joined by "+" are combined. "shipped" is the
    SpecFormer that comes with the package for this model, and "auto" the best that was measured:
    prompt lookup, with what is shipped for the model. Raises ConfigError for an unknown name or
    option, or a drafter of another model, ModelError for a folder that cannot be read."""
    if spec == NONE:
        return None
    if spec == AUTO:
        spec = UNTRAINED if shipped_for(target) is None else BEST
    if spec.partition(":")[0] not in DRAFTERS and os.path.isdir(spec):
        return DRAFTERS.get(TRAINED)(target, folder=spec)
    parts = spec.split("+")
    if len(parts) > 1:
        made = [one for part in parts if (one := make_drafter(part, target)) is not None]
        return Combined(made) if made else None
    return build(DRAFTERS, spec, target)


def shipped_for(target: FlatModel) -> Path | None:
    """The folder of the drafter and the phrases that come with the package for ``target``, if they
    do."""
    for config in sorted(SHIPPED.glob(f"*/{CONFIG}")):
        if json.loads(config.read_text())["fingerprint"] == target.fingerprint:
            return config.parent
    return None

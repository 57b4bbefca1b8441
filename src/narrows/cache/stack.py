"""From a spec string to the policy that builds a sequence's layer caches.

``name`` or ``name:option=value,option=value``; ``CachePolicy.spec`` gives the string back.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from narrows.cache.thinned import combine
from narrows.contracts import CachePolicy
from narrows.errors import ConfigError
from narrows.registry import Registry, build

POLICIES: Registry[Callable[..., CachePolicy]] = Registry("cache policy")
"""Name -> callable that takes the spec's options as keyword strings."""

POLICIES.add("dense", "narrows.cache.dense:DensePolicy")
for _name in ("kivi", "asymkv", "xquant"):
    POLICIES.add(_name, f"narrows.cache.quantized:{_name}")
for _name in ("streaming", "h2o", "tova", "snapkv", "pyramidkv", "expected", "kvzip", "evict"):
    POLICIES.add(_name, f"narrows.cache.evict:{_name}")
POLICIES.add("spindle", "narrows.cache.spindle:spindle")


def parse_cache(spec: str) -> CachePolicy:
    """The policy ``spec`` names; two specs joined by a plus sign are one after the other, see
    ``cache.thinned``. Raises ConfigError for an unknown name or option, or what cannot be joined.
    """
    # Pairs of layers are written with a plus, too: key_pairs=17+21.
    parts = re.split(r"\+(?=[a-z])", spec)
    if len(parts) == 1:
        return build(POLICIES, spec)
    if len(parts) > 2:
        raise ConfigError(f"cache policy {spec!r}: no more than two can be combined")
    return combine(*(build(POLICIES, part) for part in parts))

"""From a spec string to the policy that builds a sequence's layer caches.

``name`` or ``name:option=value,option=value``; ``CachePolicy.spec`` gives the string back.
"""

from __future__ import annotations

from collections.abc import Callable

from narrows.contracts import CachePolicy
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
    """The policy ``spec`` names. Raises ConfigError for an unknown name or option."""
    return build(POLICIES, spec)

"""From a spec string to the policy that builds a sequence's layer caches.

``name`` or ``name:option=value,option=value``; ``CachePolicy.spec`` gives the string back.
"""

from __future__ import annotations

from collections.abc import Callable

from narrows.contracts import CachePolicy
from narrows.errors import ConfigError
from narrows.registry import Registry

POLICIES: Registry[Callable[..., CachePolicy]] = Registry("cache policy")
"""Name -> callable that takes the spec's options as keyword strings."""

POLICIES.add("dense", "narrows.cache.dense:DensePolicy")
for _name in ("kivi", "asymkv", "xquant"):
    POLICIES.add(_name, f"narrows.cache.quantized:{_name}")


def parse_cache(spec: str) -> CachePolicy:
    """The policy ``spec`` names. Raises ConfigError for an unknown name or option."""
    name, colon, rest = spec.strip().partition(":")
    options: dict[str, str] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"cache {spec!r}: {item!r} is not of the form option=value")
        if key in options:
            raise ConfigError(f"cache {spec!r}: option {key!r} is given twice")
        options[key] = value
    factory = POLICIES.get(name)
    try:
        return factory(**options)
    except TypeError:
        raise ConfigError(f"cache {name!r} has no option among: {', '.join(options)}") from None

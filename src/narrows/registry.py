"""A name -> object table that loads lazily, refuses duplicates and helps with typos."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

from narrows.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects by name; a target given as ``"module:attribute"`` is imported at first use.

    Args:
        kind: what is registered, for error messages ("compression method").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._targets: dict[str, T | str] = {}

    def add(self, name: str, target: T | str) -> None:
        """Register ``target`` under ``name``. Raises ConfigError if the name is taken."""
        if name in self._targets:
            raise ConfigError(f"{self.kind} {name!r} is registered twice")
        self._targets[name] = target

    def get(self, name: str) -> T:
        """The object called ``name``. Raises ConfigError naming the choices if unknown."""
        if name not in self._targets:
            close = difflib.get_close_matches(name, self._targets, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"unknown {self.kind} {name!r}{hint} (known: {', '.join(sorted(self._targets))})"
            )
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = cast(T, getattr(importlib.import_module(module), attribute))
            self._targets[name] = target
        return target

    def __contains__(self, name: str) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._targets))


def split_spec(kind: str, spec: str) -> tuple[str, dict[str, str]]:
    """``name`` or ``name:option=value,option=value`` as the name and its options. Raises
    ConfigError, which speaks of a ``kind``, for another form or an option given twice."""
    name, colon, rest = spec.strip().partition(":")
    options: dict[str, str] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"{kind} {spec!r}: {item!r} is not of the form option=value")
        if key in options:
            raise ConfigError(f"{kind} {spec!r}: option {key!r} is given twice")
        options[key] = value
    return name, options


def build(registry: Registry[Callable[..., T]], spec: str, *given: Any) -> T:
    """What ``spec`` (see ``split_spec``) makes of the callables in ``registry``, which take what is
    ``given`` and options as keyword strings. Raises ConfigError for a bad spec, an unknown name or
    option."""
    name, options = split_spec(registry.kind, spec)
    factory = registry.get(name)
    try:
        return factory(*given, **options)
    except TypeError:
        raise ConfigError(
            f"{registry.kind} {name!r} has no option among: {', '.join(options)}"
        ) from None

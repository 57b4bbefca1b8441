"""Looks at the hidden states inside transformers' own model code, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def tapped(decoder: Any, tap: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, ``tap`` is shown the number of each layer of ``decoder``, a base model of one
    flat sequence, and the states ``[T, hidden_size]`` that enter it."""
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    with ExitStack() as hooks:
        for number, layer in enumerate(layers):

            def look(
                _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], n: int = number
            ) -> None:
                states = args[0] if args else kwargs["hidden_states"]
                tap(n, states[0])

            handle = layer.register_forward_pre_hook(look, with_kwargs=True)
            hooks.callback(handle.remove)
        yield

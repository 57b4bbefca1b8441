"""Looks at the hidden states inside transformers' own model code, by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def tapped(decoder: Any, taps: Mapping[int, Tensor], rows: Tensor | None = None) -> Iterator[None]:
    """While open, the states ``[n, hidden_size]`` that enter layer ``i`` of ``decoder``, a base
    model of one flat sequence, are written to ``taps[i]``: those of ``rows``, None: of all."""
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            if number not in taps:
                continue

            def look(
                _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], to: Tensor = taps[number]
            ) -> None:
                states = (args[0] if args else kwargs["hidden_states"])[0]
                to.copy_(states if rows is None else states[rows])

            handle = layer.register_forward_pre_hook(look, with_kwargs=True)
            hooks.callback(handle.remove)
        yield

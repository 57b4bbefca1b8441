"""The models ``narrows bench latent`` compares: a base, its conversions, and folders made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from narrows.bench.cache_subjects import Ours
from narrows.contracts import LayerCache
from narrows.errors import ConfigError
from narrows.latent import checkpoint
from narrows.latent.convert import check, convert, parse_preset
from narrows.latent.statistics import measure
from narrows.llm import LLM
from narrows.model import attention, hub
from narrows.model.flat import FlatModel
from narrows.train import texts

BASE = "base"
LOOKED_AT = 256
"""Tokens of a window that a conversion looks at."""

Size = tuple[int, int]
"""Numbers of a key head and of a value head."""


class Candidate(Ours):
    """A model with its own dense cache, under a name. Its nominal bits are for a number of the
    cache of ``base``, so that they can stand beside those of compressed caches of the base, and
    what it holds is without the room its buffers keep for tokens to come, which those do not.

    ``facts`` go to each of its rows: ``qk`` and ``vo``, the ``preset`` it was converted by (None:
    the base, or a folder), the tokens it was trained with since."""

    def __init__(
        self, model: FlatModel, name: str, base: FlatModel, preset: str | None = None
    ) -> None:
        super().__init__(model, "dense")
        self.method = name
        self.nominal_bits *= token_bytes(model) / token_bytes(base)
        layer = model.shape.layers[0]
        told = getattr(model.config, "kv_latent", None) or {}
        self.facts: dict[str, Any] = {
            "qk": layer.key_dim,
            "vo": layer.value_dim,
            "preset": preset,
            "trained_tokens": told.get("trained_tokens", 0),
        }

    def held(self, reader: list[LayerCache]) -> int:
        """Bytes of the keys and values of the tokens read."""
        return sum(x.numel() * x.itemsize for cache in reader for x in cache.materialize())

    def reserved(self, reader: list[LayerCache]) -> int:
        """Bytes with that room."""
        return super().held(reader)


def token_bytes(model: FlatModel) -> int:
    """Bytes of one token's keys and values in all layers, in the model's dtype."""
    shape = model.shape
    return sum(layer.numbers for layer in shape.layers) * shape.dtype.itemsize


def parse_sizes(text: str) -> list[Size]:
    """``32x16,48x48`` as sizes of keys and of values; ``none`` is no size. Raises ConfigError."""
    if text == "none":
        return []
    sizes = []
    for each in text.split(","):
        qk, _, vo = each.strip().partition("x")
        if not (qk.isdecimal() and vo.isdecimal()):
            raise ConfigError(f"sizes: {each!r} is not a key size, x, and a value size: 32x16")
        sizes.append((int(qk), int(vo)))
    return list(dict.fromkeys(sizes))


def quarters(head: int) -> list[Size]:
    """The sizes of which both are one, two, three or four quarters of ``head``, but for the
    whole head."""
    steps = [head * number // 4 for number in (1, 2, 3, 4)]
    return [(qk, vo) for qk in steps for vo in steps if (qk, vo) != (head, head)]


def make_candidates(
    llm: LLM,
    sizes: Sequence[Size],
    presets: Sequence[str],
    *,
    text: str,
    data: Path | None,
    windows: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """Conversions of the model of ``llm`` to each of ``sizes`` by each of ``presets``, in memory
    and untrained; ``windows`` of ``text`` are looked at as ``narrows convert`` does. ``advance``
    is called after each. Raises as ``convert`` and ``texts.gather``."""
    base = llm.model
    stock = checkpoint.load(hub.resolve(base.name), dtype=base.shape.dtype)
    stock.to(base.shape.device)
    wanted = [(preset, parse_preset(preset, qk, vo)) for preset in presets for qk, vo in sizes]
    for _, options in wanted:
        check(stock.config, options)
    layers = []
    if any(options.looks for _, options in wanted):
        seen = texts.gather(text, llm, LOOKED_AT, windows, data=data, seed=seed)
        layers = measure(stock, seen)
    made = []
    for preset, options in wanted:
        model = convert(stock, options, layers)
        model.set_attn_implementation(attention.NAME)
        name = f"{options.qk}x{options.vo} {preset}"
        flat = FlatModel(model, base.tokenizer, name)
        made.append(Candidate(flat, name, base, preset))
        advance()
    return made


def load_candidate(folder: Path, base: FlatModel, dtype: str, device: str | None) -> Candidate:
    """The converted model in ``folder``. Raises ModelError, or ConfigError if it is not one made
    of ``base``."""
    model = FlatModel.load(str(folder), dtype=dtype, device=device)
    if getattr(model.config, "kv_latent", None) is None:
        raise ConfigError(f"also: {folder} is no converted model; see narrows convert kv-latent")
    ours, theirs = model.shape, base.shape
    if (len(ours.layers), ours.vocab_size) != (len(theirs.layers), theirs.vocab_size):
        raise ConfigError(f"also: {folder} was not made of {base.name}")
    layer = ours.layers[0]
    return Candidate(model, f"{layer.key_dim}x{layer.value_dim} {folder.name}", base)

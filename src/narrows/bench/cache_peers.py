"""The caches of transformers that ``narrows bench cache`` measures beside ours, in its own model.

Its quantised caches work differently: prompt and residual are quantised together, both keys and
values in groups along the channels of a token, all of it again whenever the residual is full, and
each step dequantises a layer whole before it attends.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

from narrows.bench.cache_kvpress import parse_kvpress
from narrows.bench.cache_subjects import random_layers
from narrows.contracts import ModelShape
from narrows.errors import ConfigError, reason
from narrows.model import hub
from narrows.model.flat import DTYPES, FlatModel
from narrows.model.pretrained import weights_from_folder

GROUP, RESIDUAL = 64, 128
"""Channels a group and tokens that may stay dense: the defaults of transformers."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A cache of transformers. ``backend`` None is its dense one; ``axis`` is what its
    documentation recommends for the backend."""

    backend: str | None = None
    bits: int = 16
    axis: int = 0


DENSE = "transformers"

PEERS = {
    DENSE: Kind(),
    "quanto4": Kind("quanto", 4, axis=0),
    "quanto2": Kind("quanto", 2, axis=0),
    "hqq4": Kind("hqq", 4, axis=1),
    "hqq2": Kind("hqq", 2, axis=1),
}
"""Peers by the name rows carry."""

PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}
LAYERS = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}


def check_peers(names: Sequence[str]) -> None:
    """Raises ConfigError for an unknown peer or one that does not run here."""
    names = [name for name in names if parse_kvpress(name) is None]
    for name in names:
        if name not in PEERS:
            raise ConfigError(
                f"unknown peer {name!r} (known: {', '.join(PEERS)}, kvpress-..., none)"
            )
    for backend in {PEERS[name].backend for name in names} - {None}:
        assert backend is not None
        if not _installed(PACKAGES[backend]):
            raise ConfigError(
                f"peers of {backend} need {PACKAGES[backend]}: pip install 'narrows[bench]', or "
                "name other peers"
            )
        _prove(backend)


def _prove(backend: str) -> None:
    """Quantise and back once: quanto compiles its unpacking when it first needs it."""
    if shutil.which("ninja") is None:  # installed beside quanto, in a folder nobody may have named
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    layer = LAYERS[backend](nbits=4)
    try:
        for _ in range(2):
            layer.update(torch.ones(1, 1, 4, GROUP), torch.ones(1, 1, 4, GROUP))
    except Exception as error:
        raise ConfigError(
            f"{PACKAGES[backend]} does not run here: {reason(error)}; it needs a C++ compiler, or "
            "name other peers"
        ) from error


def load_stock(model: FlatModel, name: str, dtype: str) -> Any:
    """The same weights in transformers' own model with its own attention."""
    loaded = weights_from_folder(AutoModelForCausalLM, hub.resolve(name), dtype=DTYPES[dtype])
    return loaded.to(model.shape.device).eval()


@dataclass(slots=True)
class Held:
    """The cache of one sequence and how many tokens it has read."""

    cache: Any
    length: int


class Peer:
    """transformers' model with one of its caches.

    Args:
        stock: the model, see ``load_stock``; peers share it.
        shape: of the same model.
        name: of PEERS.
    """

    engine = "transformers"
    compressing_s = 0.0

    def __init__(self, stock: Any, shape: ModelShape, name: str) -> None:
        self.stock = stock
        self.shape = shape
        self.method = name
        self.kind = PEERS[name]
        dense = self.kind.backend is None
        self.nominal_bits = float(8 * shape.dtype.itemsize if dense else self.kind.bits)

    @torch.inference_mode()
    def read(self, prompt: Sequence[int]) -> Held:
        """See Subject; in one pass, since the cache quantises at the end of the first one."""
        self._check(len(prompt))
        held = Held(self._empty(), 0)
        self._forward(held, list(prompt))
        return held

    @torch.inference_mode()
    def fill(self, tokens: int, seed: int) -> Held:
        """See Subject."""
        self._check(tokens)
        held = Held(self._empty(), tokens)
        layers = self.shape.layers
        pairs = random_layers(layers, tokens, self.shape.dtype, self.shape.device, seed)
        for number, (k, v) in enumerate(pairs):
            held.cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], number)
        return held

    @torch.inference_mode()
    def step(self, readers: Sequence[Held], tokens: Sequence[int]) -> Tensor:
        """See Subject; one reader after the other, which is fair only to quality."""
        return torch.cat(
            [self._forward(held, [t]) for held, t in zip(readers, tokens, strict=True)]
        )

    def held(self, reader: Held) -> int:
        """See Subject: every tensor the cache's layers refer to, each storage once."""
        storages = {}
        for tensor in tensors(vars(reader.cache)):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _check(self, tokens: int) -> None:
        """Groups run on from token to token, and hqq packs whole groups into a byte."""
        block = GROUP * (8 // self.kind.bits if self.kind.backend == "hqq" else 1)
        for layer in self.shape.layers if self.kind.backend else ():
            for dim in (layer.key_dim, layer.value_dim):
                if tokens * layer.kv_heads * dim % block:
                    raise ConfigError(
                        f"{self.method} cannot take a prompt of {tokens} tokens of this model; "
                        "give a multiple of 64"
                    )

    def _empty(self) -> Any:
        config, kind = self.stock.config, self.kind
        if kind.backend is None:
            return DynamicCache(config=config)
        return QuantizedCache(
            kind.backend,
            config,
            nbits=kind.bits,
            axis_key=kind.axis,
            axis_value=kind.axis,
            q_group_size=GROUP,
            residual_length=RESIDUAL,
        )

    def _forward(self, held: Held, ids: list[int]) -> Tensor:
        device = self.shape.device
        stop = held.length + len(ids)
        out = self.stock(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.arange(held.length, stop, device=device)[None],
            past_key_values=held.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        held.length = stop
        logits: Tensor = out.logits[0].float()
        return logits


def tensors(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The plain tensors reachable through containers and attributes; a tensor that wraps others
    (a quantised one, say) stands for those."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        # Torch's protocol for a tensor that only wraps others.
        flatten = getattr(thing, "__tensor_flatten__", None)
        if flatten is None:
            yield thing
            return
        parts: list[Any] = [getattr(thing, name) for name in flatten()[0]]
    elif isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    for part in parts:
        yield from tensors(part, seen)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it
        return False

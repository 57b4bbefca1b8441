"""Sealed caches on disk: read a book once, ask about it later.

A file is safetensors with one JSON object in its header: format and version, the model's
fingerprint, the cache's spec, a checksum of every tensor, and the layer caches as a table of
objects whose fields are numbers, texts, lists, tensors by number or objects by number. Only the
classes named here are ever made of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrows.cache import (
    budget,
    codebook,
    codes,
    dense,
    either,
    evict_layer,
    evict_options,
    heads,
    plan,
    quantized,
    spindle,
    stretch,
    thinned,
)
from narrows.contracts import LayerCache, LayerShape, Rotary
from narrows.errors import ConfigError, InputError, reason
from narrows.files import replacing

FORMAT, VERSION = "narrows-cache", 3
TOLD = ("model", "spec", "dtype", "nodes", "layers")
"""What a header must hold."""

CLASSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(dense.DenseLayer, evict_layer.EvictLayer, heads.HeadStore, spindle.SpindleLayer),
        *(codebook.Codebook, codebook.Rule, evict_options.EvictOptions, spindle.SpindleOptions),
        *(quantized.QuantLayer, stretch.Stretch, codes.KeyCodes, codes.ValueCodes),
        *(codes.Plain, codes.SecondLevel, plan.QuantOptions, plan.LayerPlan, plan.Side),
        *(thinned.ThinnedLayer, either.EitherLayer, budget.Choice, LayerShape),
    )
}
Node = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SavedCache:
    """The sealed caches of a sequence that has read ``tokens``, its prompt.

    ``spec`` is of the policy that built them, ``model`` the fingerprint of the model that read and
    ``dtype`` the precision it ran in.
    """

    tokens: tuple[int, ...]
    caches: list[LayerCache]
    spec: str
    model: str
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes the caches hold."""
        return sum(cache.nbytes for cache in self.caches)


def save_cache(saved: SavedCache, path: Path) -> None:
    """Write ``saved`` to ``path``, which is replaced only when all is written. Raises InputError if
    the disk refuses."""
    tensors: list[Tensor] = [torch.tensor(saved.tokens, dtype=torch.int64)]
    nodes: list[Node] = []
    seen: dict[int, int] = {}
    roots = [_node(cache, nodes, tensors, seen) for cache in saved.caches]
    # Copies, since safetensors refuses tensors that share a storage.
    named = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(tensors)}
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": saved.model,
        "spec": saved.spec,
        "dtype": saved.dtype,
        "nodes": nodes,
        "layers": roots,
    }
    header["checksum"] = _checksum(header, named)
    with replacing(path) as beside:
        save_file(named, beside, {FORMAT: json.dumps(header)})


def load_cache(path: Path, rotary: Rotary | None, device: torch.device) -> SavedCache:
    """The cache in ``path``, on ``device``; ``rotary`` is that of the model that goes on with it.
    Raises InputError for a file that is missing, cut short, changed, or of another kind."""
    header, tensors = _read(path)
    try:
        held = {name: t.to(device) for name, t in tensors.items()}
        made: dict[int, Any] = {}
        caches = [_object(n, header["nodes"], held, made, rotary) for n in header["layers"]]
        tokens = tuple(tensors["0"].tolist())
        if not all(isinstance(c, LayerCache) and c.length == len(tokens) for c in caches):
            raise ValueError("its layers have not read its tokens")
        _check(made.values())
        return SavedCache(tokens, caches, header["spec"], header["model"], header["dtype"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ConfigError) as error:
        raise InputError(f"{path}: not a cache this version can read: {reason(error)}") from None


def describe_cache(path: Path) -> dict[str, Any]:
    """Spec, model fingerprint, tokens and bytes of the tensors of a file. Raises as
    ``load_cache``."""
    header, tensors = _read(path)
    return {
        "spec": header["spec"],
        "model": header["model"],
        "dtype": header["dtype"],
        "tokens": tensors["0"].numel(),
        "bytes": sum(t.nbytes for name, t in tensors.items() if name != "0"),
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; save one with narrows cache save")
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(FORMAT)
            if told is None:
                raise InputError(f"{path}: a safetensors file, but not a saved cache")
            header = json.loads(told)
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
            if header.get("format") != FORMAT or header.get("version") != VERSION:
                raise InputError(
                    f"{path}: version {header.get('version')} of the format, but this reads "
                    f"{VERSION}; save the cache anew"
                )
            if lost := [name for name in TOLD if name not in header]:
                raise ValueError(f"its header lacks {', '.join(lost)}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.pop("checksum", None) != _checksum(header, tensors):
            raise InputError(f"{path}: the checksum is wrong; the file has been changed or damaged")
        return header, tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a saved cache, or cut short: {reason(error)}") from None


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    told = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        told.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def _node(thing: Any, nodes: list[Node], tensors: list[Tensor], seen: dict[int, int]) -> int:
    """The number of ``thing`` in the table, where it and all it refers to now are."""
    if id(thing) in seen:
        return seen[id(thing)]
    seen[id(thing)] = number = len(nodes)
    kind = type(thing).__name__
    if CLASSES.get(kind) is not type(thing):
        raise ConfigError(f"a cache with a {kind} cannot be saved")
    node: Node = {"class": kind, "fields": {}}
    nodes.append(node)
    for name, value in _fields(thing):
        node["fields"][name] = _value(value, nodes, tensors, seen)
    return number


def _fields(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, BaseModel):
        yield from thing.model_dump().items()
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield field.name, getattr(thing, field.name)
    else:
        made_anew = ("_codes", "_fixed", "_record", "_place")  # of the rest, and full of addresses
        yield from ((k, None if k in made_anew else v) for k, v in vars(thing).items())


def _value(value: Any, nodes: list[Node], tensors: list[Tensor], seen: dict[int, int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        inside = [_value(v, nodes, tensors, seen) for v in value]
        return {"tuple" if isinstance(value, tuple) else "list": inside}
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if callable(value) and hasattr(value, "steps"):
        return {"rotary": True}
    return {"object": _node(value, nodes, tensors, seen)}


def _object(
    number: int,
    nodes: Sequence[Node],
    tensors: dict[str, Tensor],
    made: dict[int, Any],
    rotary: Rotary | None,
) -> Any:
    if number in made:
        return made[number]
    node = nodes[number]
    kind = CLASSES[node["class"]]

    def value(told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        ((what, inside),) = told.items()
        if what == "tensor":
            return tensors[str(inside)]
        if what == "object":
            return _object(inside, nodes, tensors, made, rotary)
        if what == "rotary":
            if rotary is None:
                raise ValueError("it needs a loaded model")
            return rotary
        return [value(x) for x in inside] if what == "list" else tuple(map(value, inside))

    if issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind):
        made[number] = kind(**{k: value(v) for k, v in node["fields"].items()})
        return made[number]
    made[number] = thing = object.__new__(kind)
    for name, told in node["fields"].items():
        vars(thing)[name] = value(told)
    return thing


def _check(things: Any) -> None:
    """Refuse numbers that would make a kernel read what it must not."""
    for thing in things:
        if isinstance(thing, codebook.Codebook) and len(thing):
            entries, index = thing.entries, thing.index
            if entries is None or not 0 <= int(index.min()) <= int(index.max()) < len(entries):
                raise ValueError("a codebook points beyond its entries")
            if len(thing.ratio) != len(index):
                raise ValueError("a codebook is incomplete")
            if thing.turns is not None:
                if len(thing.turns) != len(index):
                    raise ValueError("a codebook is incomplete")
                thing._farthest = max(thing._farthest, int(thing.turns.abs().max()))
        if isinstance(thing, heads.HeadStore):
            thing._spare = 0  # counted anew
            for side, buffers in enumerate((thing.k, thing.v)):
                for head, held in enumerate(thing.held):
                    if not 0 <= held - thing.coded(side, head) <= buffers[head].shape[1]:
                        raise ValueError("a buffer is too short")

"""What ``narrows bench cache`` compares, behind one interface: a model with a kind of cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from narrows.cache.evict import EvictPolicy
from narrows.cache.rehearse import rehearse
from narrows.cache.stack import parse_cache
from narrows.cache.thinned import ThinnedPolicy
from narrows.config import EngineConfig
from narrows.contracts import CachePolicy, FlatBatch, LayerCache, LayerShape, ModelShape
from narrows.errors import ConfigError
from narrows.model.flat import FlatModel

Reader = Any
"""The cache of one sequence, as its Subject made it."""


class Subject(Protocol):
    """A model with one kind of cache.

    A reader is the cache of one sequence that has read a prompt and was then told to compress;
    every token after that is a decoding step through what is held.
    """

    method: str
    """The cache's spec, or the peer's name."""

    engine: str
    """Whose model code runs: subjects of one engine share their dense yardstick."""

    nominal_bits: float
    """Code bits an element, without scales and what stays dense."""

    compressing_s: float
    """Seconds that compressing the newest reader's prompt took; 0 where that is not known."""

    def read(self, prompt: Sequence[int]) -> Reader:
        """A reader of ``prompt``: attention to the prompt is dense, what is kept is not."""

    def fill(self, tokens: int, seed: int) -> Reader:
        """A reader as after a prompt of ``tokens`` tokens, of random keys and values: for what
        does not depend on them."""

    def step(self, readers: Sequence[Reader], tokens: Sequence[int]) -> Tensor:
        """Give each reader its next token: float32 logits ``[len(readers), vocab_size]``."""

    def held(self, reader: Reader) -> int:
        """Bytes of the distinct storages the reader holds."""


class Ours:
    """This package's forward pass with the cache policy of a spec string.

    An evicting cache may be given a share of the bytes a prompt has in the model's own precision,
    ``snapkv@0.5``: a byte budget for each prompt read. Raises ConfigError for a spec that is wrong
    or that the model cannot take.
    """

    engine = "narrows"

    def __init__(self, model: FlatModel, spec: str) -> None:
        self.model = model
        self.policy, self.share = parse_subject(spec)
        self.method = subject_name(self.policy, self.share)
        nominal = getattr(self.policy, "nominal_bits", None)
        dense = float(8 * model.shape.dtype.itemsize)
        self.nominal_bits = dense if nominal is None else float(nominal(model.shape))
        self.compressing_s = 0.0
        self.policy.build(model.shape)  # a plan this model cannot take is refused now

    def read(self, prompt: Sequence[int]) -> list[LayerCache]:
        """See Subject; in the chunks the engine reads prompts in."""
        caches = self._policy(len(prompt)).build(self.model.shape)
        size = EngineConfig().prefill_chunk
        for start in range(0, len(prompt), size):
            self._forward([caches], [prompt[start : start + size]])
        return self._compress(caches, prompt)

    def fill(self, tokens: int, seed: int) -> list[LayerCache]:
        """See Subject; an evicting cache reads random tokens, to have attention to go by."""
        shape = self.model.shape
        if isinstance(self.policy, EvictPolicy | ThinnedPolicy):
            chance = torch.Generator().manual_seed(seed)
            return self.read(
                torch.randint(0, shape.vocab_size, (tokens,), generator=chance).tolist()
            )
        caches = self.policy.build(shape)
        pairs = random_layers(shape.layers, tokens, shape.dtype, shape.device, seed)
        for cache, (k, v) in zip(caches, pairs, strict=True):
            cache.append(k, v)
        return self._compress(caches, [])

    def step(self, readers: Sequence[list[LayerCache]], tokens: Sequence[int]) -> Tensor:
        """See Subject; all readers in one flat batch."""
        return self.model.logits(self._forward(readers, [[t] for t in tokens]))

    def held(self, reader: list[LayerCache]) -> int:
        """See Subject."""
        return sum(cache.nbytes for cache in reader)

    def _compress(self, caches: list[LayerCache], prompt: Sequence[int]) -> list[LayerCache]:
        started = time.perf_counter()
        if self.policy.rehearses:
            rehearse(self.model, caches, prompt)
        for cache in caches:
            cache.seal()
        self.compressing_s = time.perf_counter() - started
        return caches

    def _policy(self, tokens: int) -> CachePolicy:
        """The policy for a prompt of so many tokens."""
        if self.share is None:
            return self.policy
        assert isinstance(self.policy, EvictPolicy)
        native = native_bytes(self.model.shape, tokens)
        return self.policy.fitted(round(self.share * native))

    def _forward(
        self, readers: Sequence[list[LayerCache]], chunks: Sequence[Sequence[int]]
    ) -> Tensor:
        ids: list[int] = []
        positions: list[int] = []
        spans = []
        for caches, chunk in zip(readers, chunks, strict=True):
            start = caches[0].length
            spans.append((len(ids), len(ids) + len(chunk)))
            positions.extend(range(start, start + len(chunk)))
            ids.extend(chunk)
        device = self.model.shape.device
        return self.model.hidden(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            FlatBatch(spans, list(readers)),
        )


def parse_subject(spec: str) -> tuple[CachePolicy, float | None]:
    """The policy and the share of ``spec``, ``policy`` or ``policy@share``. Raises ConfigError."""
    told, _, share = spec.partition("@")
    policy = parse_cache(told)
    if not share:
        return policy, None
    if not isinstance(policy, EvictPolicy):
        raise ConfigError(f"cache {spec!r}: only an evicting cache can be given a share of bytes")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ConfigError(f"cache {spec!r}: the share must be above 0 and at most 1")
    return policy, value


def subject_name(policy: CachePolicy, share: float | None) -> str:
    """What ``parse_subject`` makes the two of."""
    return policy.spec if share is None else f"{policy.spec}@{share:g}"


def native_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in the model's own precision, in the
    full-attention layers."""
    numbers = sum(layer.numbers for layer in shape.layers if layer.window is None)
    return tokens * numbers * shape.dtype.itemsize


def random_layers(
    layers: Sequence[LayerShape], tokens: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normal keys and values ``[tokens, kv_heads, dim]`` of each layer in turn; the same for the
    same seed."""
    chance = torch.Generator().manual_seed(seed)
    for layer in layers:
        yield tuple(  # type: ignore[misc]
            torch.randn(tokens, layer.kv_heads, dim, generator=chance).to(device, dtype)
            for dim in (layer.key_dim, layer.value_dim)
        )

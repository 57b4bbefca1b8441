"""Any cache policy as a transformers ``Cache``, for stock models and stock ``generate``.

``model.generate(..., past_key_values=hf_cache("dense", model))``. Each sequence of the batch has
its own layer caches, built by the policy. ``update`` appends to them and gives the model's own
attention dense keys and values, so what is *stored* is compressed while every step still builds
dense copies of one layer at a time: exact, and slow. For speed use ``narrows.LLM``, which attends
on the stored form.

When what is stored changes:

* The prompt is attended to unquantised: the layers are sealed when the pass after it begins, or
  by ``PolicyCache.seal``. With ``prefill_chunk_size`` say how long the prompt is
  (``prompt_tokens``), since its chunks cannot be told from later passes.
* A later pass of one token appends, then attends, as our engine does. A pass of several tokens (a
  second turn's prompt, a draft being verified) attends to what was stored before it and to its own
  tokens unquantised; they are appended after it.
* Assisted decoding asks the cache, by ``activate_past_recording``, to be able to go back. From then
  on the newest tokens, at most HELD, wait uncompressed until ``crop`` has said how many stay. So
  every policy can be used with it, and what ends up stored is what appending one by one stores.
* ``crop`` without that request is the policy's own rollback, which may refuse: ConfigError.

Tokens that a two-dimensional ``attention_mask`` hides (padding) are not stored, so they cannot
stretch the range of a quantisation group. ``hf_cache`` hooks the model's decoder to see the mask.
With a mask of another form, or a model that was not the one given to ``hf_cache``, padding is
stored like any token. No gradient flows through what is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from narrows.cache.evict import EvictPolicy
from narrows.cache.stack import parse_cache
from narrows.cache.thinned import ThinnedPolicy
from narrows.contracts import CachePolicy, LayerCache, ModelShape
from narrows.errors import ConfigError, InputError, ModelError
from narrows.model.adapter import model_shape

HELD = 128
"""Most tokens that wait uncompressed for ``crop`` while past states are being recorded."""


def hf_cache(
    spec: str | CachePolicy, model: Any, *, prompt_tokens: int | None = None
) -> PolicyCache:
    """An empty cache for ``model``, a transformers causal language model, of the policy ``spec``.

    ``prompt_tokens`` is the length of the prompt, padding included, if it is read in several
    passes; None means that the first pass reads it. Leaves a hook on the model's decoder (see the
    module). Raises ConfigError for a bad spec or a model spread over devices, UnsupportedModel for
    an architecture we do not know.
    """
    policy = parse_cache(spec) if isinstance(spec, str) else spec
    if isinstance(policy, EvictPolicy | ThinnedPolicy):
        raise ConfigError(
            f"cache {policy.spec!r} drops tokens, which transformers' attention cannot follow; "
            "use it with narrows.LLM"
        )
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ConfigError(f"hf_cache needs the whole model on one device, not on {len(devices)}")
    config = model.config.get_text_config(decoder=True)
    shape = model_shape(config, model.dtype, model.device)
    policy.build(shape)  # refuse here, not in the middle of the first pass
    decoder = model.base_model
    if not any(hook is _note_mask for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(_note_mask, with_kwargs=True)
    return PolicyCache(policy, shape, prompt_tokens)


def _note_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook: tell one of our caches which mask the pass that begins now has."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, PolicyCache):
        cache.note_mask(kwargs.get("attention_mask"))


class _Rows:
    """The state that all layers share.

    ``rows[i][layer]`` are the layer caches of sequence ``i``. A *slot* is a place in the batch's
    padded sequences: ``real`` bool ``[batch, slots]`` says which slots hold a stored token.
    ``counts[layer]`` are the slots a layer has been given; ``waiting[layer]`` the keys and values
    ``[batch, kv_heads, n, dim]`` of its newest slots if they are not appended yet.
    """

    def __init__(self, policy: CachePolicy, shape: ModelShape, prompt_tokens: int | None) -> None:
        self.policy = policy
        self.shape = shape
        self.prompt_tokens = prompt_tokens
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        count = len(self.shape.layers)
        self.rows: list[list[LayerCache]] = []
        self.real = torch.zeros((0, 0), dtype=torch.bool)
        self.counts = [0] * count
        self.waiting: list[tuple[Tensor, Tensor] | None] = [None] * count
        self.mask: Tensor | None = None
        self.sealed = False

    def begin(self, layer: int, batch: int, n: int) -> None:
        """Called by each layer of a pass of ``n`` slots; the first one opens the pass."""
        slots = self.real.shape[1]
        if self.counts[layer] != slots:
            if self.counts[layer] + n != slots:
                raise ModelError("a forward pass through this cache stopped half way; reset() it")
            return
        if any(count != slots for count in self.counts):
            raise ModelError("a forward pass through this cache stopped half way; reset() it")
        if not self.rows:
            self.rows = [self.policy.build(self.shape) for _ in range(batch)]
            self.real = torch.zeros((batch, 0), dtype=torch.bool)
        elif len(self.rows) != batch:
            raise InputError(f"the cache holds {len(self.rows)} sequences, but {batch} were given")
        elif slots >= (self.prompt_tokens or 1):
            self.seal()
        self.real = torch.cat([self.real, self._shown(batch, slots, n)], dim=1)

    def _shown(self, batch: int, slots: int, n: int) -> Tensor:
        """Which of the ``n`` next slots the noted mask shows, bool ``[batch, n]``."""
        mask, self.mask = self.mask, None
        if mask is None or mask.shape != (batch, slots + n):
            return torch.ones((batch, n), dtype=torch.bool)
        shown = mask.to("cpu", torch.bool)
        if bool((shown[:, :slots] & ~self.real).any()):
            raise InputError("attention_mask shows tokens that it hid when they were read")
        return shown[:, slots:]

    @torch.inference_mode()
    def seal(self) -> None:
        """Tell every layer, once, that its prompt has been read."""
        if not self.sealed:
            self.sealed = True
            for row in self.rows:
                for cache in row:
                    cache.seal()

    @torch.inference_mode()
    def select(self, indices: Sequence[int]) -> None:
        """Make sequence ``i`` of the batch what ``indices[i]`` was; a sequence asked for twice is
        copied as a whole, so that layers that borrow from each other do so within the copy."""
        seen: set[int] = set()
        rows = []
        for i in indices:
            rows.append(copy.deepcopy(self.rows[i]) if i in seen else self.rows[i])
            seen.add(i)
        self.rows = rows
        order = torch.tensor(indices, dtype=torch.long)
        self.real = self.real[order]
        self.waiting = [
            pair and (pair[0][order.to(pair[0].device)], pair[1][order.to(pair[1].device)])
            for pair in self.waiting
        ]

    @torch.inference_mode()
    def append(self, layer: int, k: Tensor, v: Tensor, start: int) -> None:
        """Store what is real of the slots from ``start`` on."""
        for i, row in enumerate(self.rows):
            keys, values = k[i].transpose(0, 1), v[i].transpose(0, 1)
            real = self.real[i, start : start + len(keys)]
            if not bool(real.all()):
                index = real.nonzero().squeeze(1).to(k.device)
                keys, values = keys[index], values[index]
            if len(keys):
                row[layer].append(keys, values)

    @torch.inference_mode()
    def commit(self, layer: int, keep: int = 0) -> None:
        """Append the waiting slots of a layer, but for the newest ``keep``."""
        pair = self.waiting[layer]
        if pair is None or (keep and pair[0].shape[2] <= keep):
            return
        k, v = pair
        n = k.shape[2] - keep
        start = self.counts[layer] - k.shape[2]
        self.append(layer, k[:, :, :n], v[:, :, :n], start)
        self.waiting[layer] = (k[:, :, n:].clone(), v[:, :, n:].clone()) if keep else None

    def view(self, layer: int, before: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Dense keys and values ``[batch, kv_heads, slots, dim]`` for queries that come after
        ``before`` slots; zeros where a slot holds no token, which the model's mask hides."""
        shape = self.shape.layers[layer]
        first = 0 if shape.window is None else max(before - shape.window + 1, 0)
        stop = self.counts[layer]
        pair = self.waiting[layer]
        stored = stop if pair is None else stop - pair[0].shape[2]
        size = (len(self.rows), shape.kv_heads, stop - first)
        k, v = like.new_zeros((*size, shape.key_dim)), like.new_zeros((*size, shape.value_dim))
        with torch.inference_mode():
            self._fill(k, v, layer, first, stored)
        return k, v

    def _fill(self, k: Tensor, v: Tensor, layer: int, first: int, stored: int) -> None:
        """Write into ``k`` and ``v`` what is stored from slot ``first`` up to ``stored``, and what
        waits after that."""
        at = max(first, stored)
        for i, row in enumerate(self.rows):
            index = self.real[i, first:at].nonzero().squeeze(1)
            if not len(index):
                continue
            keys, values = row[layer].materialize()
            if len(keys) < len(index):
                raise ConfigError(
                    f"cache {self.policy.spec!r} gives back {len(keys)} of {len(index)} tokens: "
                    "a cache that drops tokens cannot be used with transformers' attention"
                )
            index = index.to(k.device)
            k[i][:, index] = keys[-len(index) :].transpose(0, 1).to(k)
            v[i][:, index] = values[-len(index) :].transpose(0, 1).to(v)
        pair = self.waiting[layer]
        if pair is not None:
            k[:, :, at - first :] = pair[0][:, :, at - stored :]
            v[:, :, at - first :] = pair[1][:, :, at - stored :]

    @torch.inference_mode()
    def crop(self, layer: int, n: int) -> None:
        """Take the newest ``n`` slots from a layer, then append what was waiting. ``real`` still
        has the slots. Raises ConfigError where the layer cannot forget them."""
        stop = self.counts[layer]
        pair = self.waiting[layer]
        waiting = 0 if pair is None else pair[0].shape[2]
        if pair is not None:
            left = max(0, waiting - n)
            self.waiting[layer] = (pair[0][:, :, :left], pair[1][:, :, :left])
        stored = stop - waiting
        for row, real in zip(self.rows, self.real, strict=True):
            try:
                row[layer].rollback(int(real[min(stored, stop - n) : stored].sum()))
            except ValueError as error:
                raise ConfigError(
                    f"cache {self.policy.spec!r}: layer {layer} cannot be cropped by {n}: {error}; "
                    "or call activate_past_recording() before the tokens are read"
                ) from None
        self.counts[layer] = stop - n
        self.commit(layer)

    @property
    def nbytes(self) -> int:
        """Bytes held, of all sequences, waiting tokens included."""
        waiting = [tensor for pair in self.waiting if pair for tensor in pair]
        return sum(t.untyped_storage().nbytes() for t in waiting) + sum(
            cache.nbytes for row in self.rows for cache in row
        )


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers sees of one layer; the state is in ``_Rows``."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, rows: _Rows, index: int) -> None:
        super().__init__()
        self.rows = rows
        self.index = index
        self.window = rows.shape.layers[index].window
        self.is_sliding = self.window is not None
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the sequences' caches are built when the first pass begins."""
        self.is_initialized = True

    def activate_past_recording(self) -> None:
        """From now on keep the newest tokens uncompressed until ``crop``."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store ``[batch, kv_heads, n, dim]`` and return what the ``n`` queries attend to, of the
        same form. Raises InputError, ConfigError, ModelError, or the policy's NumericalError."""
        rows, layer, n = self.rows, self.index, key_states.shape[2]
        k, v = key_states.detach(), value_states.detach()
        rows.begin(layer, key_states.shape[0], n)
        self.is_initialized = True
        if not self.record_past:
            rows.commit(layer)
        before = rows.counts[layer]
        rows.counts[layer] += n
        if rows.sealed and (n > 1 or self.record_past):
            old = rows.waiting[layer]
            rows.waiting[layer] = (
                (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))
            )
            seen = rows.view(layer, before, k)
            rows.commit(layer, HELD if self.record_past else 0)
            return seen
        rows.append(layer, k, v, before)
        return rows.view(layer, before, k) if before else (key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a pass of ``query_length`` tokens will be given."""
        before = self.rows.counts[self.index]
        offset = 0 if self.window is None else max(before - self.window + 1, 0)
        return before + query_length - offset, offset

    def get_seq_length(self) -> int:
        """Slots given so far, padding included."""
        return self.rows.counts[self.index]

    def get_max_length(self) -> int:
        """The window of a sliding layer, else -1: no limit."""
        return -1 if self.window is None else self.window


class PolicyCache(Cache):  # type: ignore[misc]
    """A transformers cache whose layers a ``CachePolicy`` built; made by ``hf_cache``.

    ``copy.deepcopy`` gives an independent cache, for example of a prompt that many requests share.
    """

    def __init__(self, policy: CachePolicy, shape: ModelShape, prompt_tokens: int | None) -> None:
        self._rows = _Rows(policy, shape, prompt_tokens)
        super().__init__(layers=[_Layer(self._rows, i) for i in range(len(shape.layers))])

    @property
    def spec(self) -> str:
        """The policy's spec string."""
        return self._rows.policy.spec

    @property
    def nbytes(self) -> int:
        """Bytes held by all sequences. Before the layers are sealed they are those of the dense
        prompt."""
        return self._rows.nbytes

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first pass."""
        return len(self._rows.rows) or -1

    @property
    def is_croppable(self) -> bool:
        """Assisted decoding works with every policy (see the module)."""
        return True

    @property
    def sequences(self) -> list[list[LayerCache]]:
        """The layer caches of each sequence, for looking at."""
        return self._rows.rows

    def note_mask(self, mask: Any) -> None:
        """Say which mask the pass that begins now has; anything but ``[batch, slots]`` is taken
        as none. The hook on the model's decoder does this."""
        self._rows.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def seal(self) -> None:
        """Compress now, rather than when the next pass begins. Further calls do nothing."""
        self._rows.seal()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` slots (a positive number, which transformers
        deprecates, is the length to keep). Raises ConfigError where the policy cannot."""
        slots, asked = self.get_seq_length(), int(tokens_to_remove)  # a tensor, in some releases
        n = slots - asked if asked > 0 else -asked
        n = min(max(n, 0), slots)
        for layer in range(len(self.layers)):
            self._rows.crop(layer, n)
        self._rows.real = self._rows.real[:, : slots - n]

    def reset(self) -> None:
        """Forget all sequences."""
        self._rows.clear()
        for layer in self.layers:
            layer.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue beam ``beam_idx[i]`` in place ``i``."""
        self._rows.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at ``indices`` (numbers, or a bool for each sequence)."""
        chosen = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self._rows.select(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence ``repeats`` times, copies side by side."""
        count = len(self._rows.rows)
        self._rows.select([i for i in range(count) for _ in range(repeats)])

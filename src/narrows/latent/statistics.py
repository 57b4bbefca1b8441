"""What a model's attention layers see and do on some text, as far as a conversion asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrows.ops.rotary import turn

QUERIES = 32
"""Places of a window from which keys are looked at."""


@dataclass(slots=True)
class LayerStatistics:
    """Sums over the tokens of some windows, of one attention layer; float64.

    ``inputs`` ``[d + 1, d + 1]`` is the second moment of what enters it, a 1 behind each vector.
    ``energy`` ``[pairs]`` sums over query heads the mean norm of a rotary pair's part of the query
    times that of its part of the key, MHA2MLA's score (arXiv 2502.14837). ``pairs``
    ``[heads, 2 * pairs, 2 * pairs]`` are second moments of each rotary pair's part of a logit: the
    real parts of query times conjugate key, then the imaginary ones, less their mean over the keys
    of a query, where keys count half by the attention they get and half alike. Times the squared
    scale, the moment of an error so measured is about twice the divergence that it makes of the
    attention.
    """

    inputs: Tensor
    energy: Tensor
    pairs: Tensor


@torch.inference_mode()
def measure(
    model: Any,
    windows: Sequence[Sequence[int]],
    on_window: Callable[[], None] = lambda: None,
) -> list[LayerStatistics]:
    """Statistics of every layer of a transformers causal language ``model`` of a family that can
    be converted, over ``windows`` of token ids; ``on_window`` is called after each."""
    layers = [layer.self_attn for layer in model.base_model.layers]
    config, head = model.config, layers[0].head_dim
    wide, heads = config.hidden_size + 1, config.num_attention_heads
    found = [
        LayerStatistics(
            torch.zeros(wide, wide, dtype=torch.float64),
            torch.zeros(head // 2, dtype=torch.float64),
            torch.zeros(heads, head, head, dtype=torch.float64),
        )
        for _ in layers
    ]

    def look(number: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            states = kwargs["hidden_states"][0]
            _add(found[number], module, states, kwargs["position_embeddings"])

        return hook

    hooks = [
        layer.register_forward_pre_hook(look(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    try:
        for window in windows:
            ids = torch.tensor([list(window)], device=model.device)
            model.base_model(input_ids=ids, use_cache=False)
            on_window()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _add(told: LayerStatistics, module: Any, states: Tensor, tables: tuple[Tensor, Tensor]) -> None:
    count = len(states)
    x = torch.cat([states, states.new_ones(count, 1)], 1).double()
    told.inputs += (x.T @ x).cpu()
    q = module.q_proj(states).view(count, -1, module.head_dim)
    k = module.k_proj(states).view(count, -1, module.head_dim)
    q = getattr(module, "q_norm", torch.nn.Identity())(q)
    k = getattr(module, "k_norm", torch.nn.Identity())(k)
    cosine, sine = (table[0].float() for table in tables)
    q, k = turn(q.float(), cosine, sine), turn(k.float(), cosine, sine)
    group = q.shape[1] // k.shape[1]
    q, k = (torch.complex(*x.chunk(2, -1)) for x in (q, k))
    told.energy += (
        (q.abs().mean(0).view(-1, group, q.shape[-1]) * k.abs().mean(0)[:, None])
        .sum((0, 1))
        .double()
        .cpu()
    )
    places = torch.linspace(count // 8, count - 1, min(QUERIES, count)).long()
    for place in sorted(set(places.tolist())):
        keys = k[: place + 1].repeat_interleave(group, 1)
        parts = q[place] * keys.conj()  # [keys, heads, pairs]
        logits = parts.real.sum(-1) * module.scaling
        weight = 0.5 * logits.softmax(0) + 0.5 / (place + 1)
        features = torch.cat([parts.real, parts.imag], -1).transpose(0, 1)  # [heads, keys, 2 pairs]
        weight = weight.T[..., None]
        features = (features - (features * weight).sum(1, keepdim=True)) * weight.sqrt()
        told.pairs += (features.transpose(1, 2) @ features).double().cpu()

"""A model's own rotary tables, for those who must turn keys and queries as it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrows.model.latent import head_dim
from narrows.ops.native import gather_rows

FIXED = ("default", "linear", "llama3", "yarn")
"""Types of rotary embedding that turn a place alike whatever the length of the text."""


class ModelRotary:
    """See ``contracts.Rotary``. Even a deep copy is the same object: it is part of the model."""

    def __init__(self, model: Any) -> None:
        """``model`` is a transformers causal language model."""
        self._module = getattr(model.base_model, "rotary_emb", None)
        config = model.config
        self._dim = head_dim(config)
        kinds = getattr(config, "layer_types", None)
        split = hasattr(self._module, "layer_types") and kinds
        self._kind = {"layer_type": "full_attention"} if split else {}
        self._device = next(model.parameters()).device
        # On another device a look at the places would wait for them.
        here = self._device.type == "cpu"
        self._fixed = here and getattr(self._module, "rope_type", None) in FIXED
        self._known = self._made(torch.arange(1, device=self._device))
        """Of the first places, where they are fixed: to look them up takes a step far less than
        to make them."""
        self._steps: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See ``contracts.Rotary``."""
        if not self._fixed:
            return self._made(positions)
        try:
            cosine, sine = self._known
            return gather_rows(cosine, positions), gather_rows(sine, positions)
        except IndexError:
            most = int(positions.max()) + 1
            if most <= len(cosine):
                raise
            every = torch.arange(max(most, 2 * len(cosine)), device=self._device)
            self._known = self._made(every)
            return self(positions)

    def _made(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._module is None:
            flat = torch.zeros((len(positions), self._dim), device=positions.device)
            return flat + 1.0, flat
        wide = torch.zeros(1, device=positions.device)  # float32 input makes float32 tables
        cosine, sine = self._module(wide, positions[None], **self._kind)
        return cosine[0], sine[0]

    def steps(self, count: int) -> tuple[Tensor, Tensor]:
        """See ``contracts.Rotary``. Made once."""
        if self._steps is None or len(self._steps[0]) < count:
            half = self._dim // 2
            places = torch.arange(count, device=self._device)
            cosine, sine = (t[:, :half] for t in self(places))
            scale = (cosine.square() + sine.square()).sqrt()
            self._steps = (cosine / scale).contiguous(), (sine / scale).contiguous()
            self._steps[0][0], self._steps[1][0] = 1.0, 0.0  # to stay is to stay, to the bit
        return self._steps

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRotary:
        return self

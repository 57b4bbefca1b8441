"""The flat forward pass: all tokens of all sequences end to end through one model.

The model is transformers' own. ``FlatModel.hidden`` runs it over ``[T]`` token ids with a
``FlatBatch`` that says which rows belong to which sequence's caches.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from narrows.contracts import FlatBatch, LayerCache, ModelShape
from narrows.errors import ConfigError, UnsupportedModel
from narrows.model import attention, hub
from narrows.model.adapter import check_supported, model_shape
from narrows.model.fast import FastDecoder
from narrows.model.latent import is_converted
from narrows.model.pretrained import from_folder, weights_from_folder
from narrows.model.rotary import ModelRotary
from narrows.model.taps import tapped
from narrows.ops.native import row_maxima

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FlatModel:
    """A causal language model and its tokenizer, run over ragged rows.

    Args:
        model: a transformers causal LM loaded with ``attn_implementation="narrows"``.
        tokenizer: its fast tokenizer (None is allowed where only ids are used, as in tests).
        name: what the user called the model.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        parameter = next(model.parameters())
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config
        self.rotary = ModelRotary(model)
        shape = model_shape(model.config, parameter.dtype, parameter.device)
        self.shape: ModelShape = replace(shape, rotary=self.rotary)
        self._head: nn.Module = model.get_output_embeddings()
        self.eos_ids = _eos_ids(model, tokenizer)
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._probe()
        self._fast = FastDecoder.of(model, self.shape)

    @classmethod
    def load(cls, name: str, *, dtype: str = "bfloat16", device: str | None = None) -> FlatModel:
        """Load a model by name (see ``narrows.model.hub.resolve``).

        ``dtype`` is one of DTYPES; ``device`` None takes CUDA where there is one, else the CPU.
        Raises ModelError, UnsupportedModel or ConfigError.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = hub.resolve(name)
        attention.install()
        config = from_folder(AutoConfig, folder)
        check_supported(config)
        model = weights_from_folder(
            AutoModelForCausalLM,
            folder,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attention.NAME,
        )
        tokenizer = from_folder(AutoTokenizer, folder)
        return cls(model.to(device), tokenizer, name)

    @torch.inference_mode()
    def hidden(self, ids: Tensor, positions: Tensor, batch: FlatBatch) -> Tensor:
        """Run the decoder: ``ids`` and ``positions`` int64 ``[T]`` -> hidden states after the
        final norm, ``[T, hidden_size]``. Appends to the batch's caches."""
        if self._fast is not None:
            return self._fast.hidden(ids, positions, batch)
        return self.reference_hidden(ids, positions, batch)

    def read(
        self, ids: Sequence[int], caches: list[LayerCache], first: int | None = None
    ) -> Tensor:
        """``hidden`` of tokens of one sequence, behind what ``caches`` hold. They stand at places
        ``first`` on; None: at those that follow."""
        device = self.shape.device
        first = caches[0].length if first is None else first
        places = torch.arange(first, first + len(ids), device=device)
        batch = FlatBatch([(0, len(ids))], [caches])
        return self.hidden(torch.tensor(ids, device=device), places, batch)

    @torch.inference_mode()
    def hidden_and_taps(
        self,
        ids: Tensor,
        positions: Tensor,
        batch: FlatBatch,
        taps: Sequence[int],
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``hidden``, and with it other hidden states, ``[n, len(taps), hidden_size]``, of those
        ``rows`` int64 ``[n]`` of the T, None: of all: number ``i`` enters decoder layer ``i``, 0 is
        the embedding, and one past the last layer are the states after the final norm, which
        ``hidden`` gives. All in the dtype of ``hidden``."""
        dtype = self.shape.dtype if self._fast is None else torch.float32
        sizes = (len(ids) if rows is None else len(rows), len(taps), self.shape.hidden_size)
        seen = torch.empty(sizes, dtype=dtype, device=self.shape.device)
        last, wanted = len(self.shape.layers), dict(zip(taps, seen.unbind(1), strict=True))
        if self._fast is not None:
            inner = {number: place for number, place in wanted.items() if number < last}
            hidden = self._fast.hidden(ids, positions, batch, inner, rows)
        else:
            with tapped(self.model.base_model, wanted, rows):
                hidden = self.reference_hidden(ids, positions, batch)
        if last in wanted:
            wanted[last].copy_(hidden if rows is None else hidden[rows])
        return hidden, seen

    @torch.inference_mode()
    def reference_hidden(self, ids: Tensor, positions: Tensor, batch: FlatBatch) -> Tensor:
        """``hidden`` by transformers' own model code, whatever faster path there is."""
        states: Tensor = self.model.base_model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, flat=batch
        ).last_hidden_state[0]
        return states

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the model's sizes and a sample of its weights, the same
        in every precision that holds bfloat16."""
        shape = self.shape
        told = hashlib.sha256(
            f"{shape.family} {len(shape.layers)} {shape.hidden_size} {shape.vocab_size}".encode()
        )
        # A converted model shares all but its attention with its base and its other conversions.
        told_apart = ("embed", "self_attn") if is_converted(self.config) else ("embed",)
        for name, weight in self.model.named_parameters():
            if weight.ndim == 1 or any(part in name for part in told_apart):
                sample = weight.detach().flatten()[:4096].to("cpu", torch.bfloat16)
                told.update(sample.view(torch.uint8).numpy().tobytes())
        return told.hexdigest()[:16]

    def embed(self, ids: Tensor) -> Tensor:
        """What token ids ``[n]`` enter the first layer as, ``[n, hidden_size]``."""
        entered: Tensor = self.model.get_input_embeddings()(ids)
        return entered

    @property
    def head(self) -> Tensor:
        """The weight that makes scores of states, ``[vocab_size, hidden_size]``; a model may still
        squash the scores, which changes none of their order."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def final_norm(self, states: Tensor) -> Tensor:
        """The norm before the head, on states ``[n, hidden_size]`` of any depth; with gradients
        for states that want them."""
        base = self.model.base_model
        norm = base.ln_f if hasattr(base, "ln_f") else base.norm
        normed: Tensor = norm(states)
        return normed

    @property
    def plain_norm(self) -> tuple[Tensor, float] | None:
        """Weight, float32, and epsilon of ``final_norm``, where that is one over the root mean
        square and the tuned pass runs it."""
        return None if self._fast is None else (self._fast.norm, self._fast.eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """Next-token logits of ``hidden`` ``[n, hidden_size]`` -> float32 ``[n, vocab_size]``, or
        bfloat16 where a float32 pass is given bfloat16 rows. They may be made in ``room``, float32,
        such as earlier ones that nobody needs any more."""
        if self._fast is not None:
            return self._fast.logits(hidden, room)
        scores: Tensor = self._head(hidden).float()
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        return scores

    @torch.inference_mode()
    def best(self, hidden: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``row_maxima(logits(hidden, room))``: the greatest logit of each row and its token, which
        may be known without making the others."""
        if self._fast is not None:
            return self._fast.best(hidden, room)
        return row_maxima(self.logits(hidden, room))

    def _probe(self) -> None:
        """Refuse a model whose layers do not pass our batch to the attention function; passing
        keyword arguments through is a convention of transformers, not a contract."""
        seen: set[int] = set()

        class Probe(FlatBatch):
            def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
                seen.add(layer)
                return q.new_zeros((*q.shape[:2], v.shape[-1]))

        ids = torch.zeros(2, dtype=torch.long, device=self.shape.device)
        self.reference_hidden(ids, torch.arange(2, device=self.shape.device), Probe([], []))
        if seen != set(range(len(self.shape.layers))):
            raise UnsupportedModel(
                f"{self.name}: {len(self.shape.layers) - len(seen)} of {len(self.shape.layers)} "
                "attention layers do not use the registered attention function"
            )


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token id that ends a text, by the generation config, the config or the tokenizer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else () if value is None else [value])
    return frozenset(found)

"""From a checkpoint to one of fewer key and value dimensions (arXiv 2507.11273, sections 3.1, 3.2).

The paper's preset takes every r-th rotary pair of queries and keys and every r-th number of values,
and gives keys its frequency-aware frequencies, which the pairs taken were not trained with. What
stands beside it are extensions: pairs chosen so that they keep their own frequencies, gains of
queries that make up for pairs that went, values in a basis that loses least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from narrows.config import Settings
from narrows.errors import ConfigError, UnsupportedModel
from narrows.latent import selection, values
from narrows.latent.frequencies import frequency_aware_places, read_off, rope_parameters
from narrows.latent.statistics import LayerStatistics
from narrows.model.latent import MODELS, head_dim, is_converted
from narrows.registry import split_spec

SMALLEST = 8
"""Numbers of a head below which nothing of use is left."""


class LatentOptions(Settings):
    """How a model is converted.

    ``qk`` and ``vo`` are the numbers of a query or key head and of a value head. ``pairs`` names
    the choice of rotary pairs (see ``narrows.latent.selection``), ``rope`` their frequencies: the
    ones they had, ``subset``, or the ``frequency_aware`` ones. ``values`` names the smaller value
    space (see ``narrows.latent.values``); ``activations`` weighs it by what enters the layer.
    ``gain`` of queries: ``none`` (the paper's; scores are divided by the root of the new size),
    ``size`` (times the root of old over new size, which keeps their spread if all pairs count
    alike), ``keep`` (times the inverse, which is the base model with the other pairs struck out)
    or ``fit`` (a complex number for each pair, see ``selection.gains``).
    """

    qk: Annotated[int, Field(ge=SMALLEST)]
    vo: Annotated[int, Field(ge=SMALLEST)]
    pairs: Literal["stride", "matched", "energy", "fit"] = "fit"
    rope: Literal["subset", "frequency_aware"] = "subset"
    values: Literal["stride", "svd", "activations"] = "activations"
    gain: Literal["none", "size", "keep", "fit"] = "fit"

    @property
    def looks(self) -> bool:
        """Whether converting needs statistics of some text."""
        return "fit" in (self.pairs, self.gain) or (
            self.pairs == "energy" or self.values == "activations"
        )


PRESETS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "paper": {
        "pairs": "stride", "rope": "frequency_aware", "values": "stride", "gain": "none"
    },
}  # fmt: skip
"""Options by name: ours, which are the defaults, and the paper's."""


def parse_preset(spec: str, qk: int, vo: int) -> LatentOptions:
    """The options of a preset, changed where ``spec`` says so: ``paper:rope=subset``. Raises
    ConfigError."""
    name, changes = split_spec("preset", spec)
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    if unknown := set(changes) - {"pairs", "rope", "values", "gain"}:
        raise ConfigError(f"preset {spec!r}: {min(unknown)!r} is none of pairs, rope, values, gain")
    return LatentOptions(qk=qk, vo=vo, **{**PRESETS[name], **changes})


def check(config: Any, options: LatentOptions) -> None:
    """Raises UnsupportedModel or ConfigError for a model or sizes that cannot be converted."""
    family = getattr(config, "model_type", None)
    if is_converted(config):
        raise UnsupportedModel("the model is converted already; convert the one it was made from")
    if family not in MODELS:
        raise UnsupportedModel(
            f"model type {family!r} cannot be converted (can be: {', '.join(MODELS)})"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel("the weights are quantised; convert the model they were made from")
    rope = config.rope_parameters
    if rope["rope_type"] == "dynamic":
        raise UnsupportedModel(
            "its rotary frequencies change with the length of the text (dynamic)"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("only a part of each head is rotary")
    size = head_dim(config)
    for name, asked in (("qk", options.qk), ("vo", options.vo)):
        if asked > size:
            raise ConfigError(f"{name} is {asked} but the heads of the model have {size} numbers")
    if options.qk % 2:
        raise ConfigError(f"qk must be even, since rotary pairs stay whole; not {options.qk}")
    if options.qk == size:
        return
    if options.pairs == "matched" and options.rope != "frequency_aware":
        raise ConfigError("pairs matched to the frequency-aware set go with rope=frequency_aware")
    if options.rope == "frequency_aware":
        frequency_aware_places(options.qk, size // 2)
    if family == "qwen3" and options.gain == "fit":
        raise ConfigError(
            "queries are normed (qwen3), so that no gain can be fitted; take preset tuned:gain=keep"
        )


def convert(model: Any, options: LatentOptions, layers: Sequence[LayerStatistics] = ()) -> Any:
    """A converted model of a transformers causal language ``model``, which stays as it is.

    ``layers`` are its statistics (``statistics.measure``), if ``options.looks``. At full sizes the
    result has the base's weights and frequencies to the bit. Raises as ``check`` does.
    """
    config = model.config
    check(config, options)
    size = head_dim(config)
    rotary = model.base_model.rotary_emb
    whole = options.qk == size
    chosen = list(range(size // 2)) if whole else _chosen(options, size // 2, layers)
    told = config.to_dict()
    for name in ("model_type", "architectures", "head_dim", "transformers_version"):
        told.pop(name, None)
    if not whole:
        places = [float(p) for p in chosen]
        if options.rope == "frequency_aware":
            places = frequency_aware_places(options.qk, size // 2)
        table = read_off(rotary.inv_freq.cpu(), places)
        told["rope_parameters"] = rope_parameters(config, table, float(rotary.attention_scaling))
    kind = MODELS[config.model_type]
    made = kind.config_class(
        **told,
        head_dim=options.qk,
        value_head_dim=options.vo,
        kv_latent={
            "options": options.model_dump(),
            "base_head_dim": size,
            "pairs": chosen,
            "trained_tokens": 0,
        },
    )
    weights = dict(model.state_dict())
    for number in range(config.num_hidden_layers):
        prefix = f"{model.base_model_prefix}.layers.{number}.self_attn."
        seen = layers[number] if layers else None
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        if not whole:
            own |= _queries_and_keys(own, config, options, chosen, seen)
        if options.vo < size:
            own |= _values_and_outputs(own, config, options, seen)
        weights |= {prefix + name: w for name, w in own.items()}
    with torch.device("meta"):
        result = kind(made)
    result.load_state_dict(weights, assign=True)
    result.tie_weights()
    # What is no weight was made on the meta device too.
    result.base_model.rotary_emb = type(rotary)(made)
    return result.to(model.device).eval()


def _chosen(options: LatentOptions, pairs: int, layers: Sequence[LayerStatistics]) -> list[int]:
    kept = options.qk // 2
    if options.pairs == "stride":
        return selection.stride(pairs, kept)
    if options.pairs == "matched":
        return selection.frequency_matched(pairs, options.qk)
    if options.pairs == "energy":
        return selection.by_energy(layers, kept)
    return selection.by_fit(layers, kept)


def _queries_and_keys(
    own: dict[str, Tensor],
    config: Any,
    options: LatentOptions,
    chosen: list[int],
    seen: LayerStatistics | None,
) -> dict[str, Tensor]:
    """The tensors of one attention layer that make queries and keys of the ``chosen`` pairs."""
    size = head_dim(config)
    at = torch.tensor([*chosen, *(p + size // 2 for p in chosen)])
    changed = {}
    for name, tensor in own.items():
        kind = name.split(".")[0]
        if kind in ("q_norm", "k_norm"):
            changed[name] = tensor[at]
        elif kind in ("q_proj", "k_proj"):
            changed[name] = tensor.view(-1, size, *tensor.shape[1:])[:, at].flatten(0, 1)
    ratio = (size / options.qk) ** 0.5
    if options.gain == "fit":
        assert seen is not None
        gain = selection.gains(seen.pairs, chosen) / ratio
    else:
        scale = {"none": 1.0, "size": ratio, "keep": 1 / ratio}[options.gain]
        if scale == 1.0:
            return changed
        gain = torch.full((config.num_attention_heads, len(chosen)), scale, dtype=torch.complex128)
    scaled = "q_norm" if "q_norm.weight" in own else "q_proj"
    for name in changed:
        if name.startswith(scaled):
            tensor = changed[name]
            # [heads, halves, pairs, ...]
            rows = tensor.double().view(-1, 2, len(chosen), *tensor.shape[1:])
            turned = torch.complex(rows[:, 0], rows[:, 1])
            by = gain[: len(turned)]
            turned = turned * by.view(*by.shape, *[1] * (turned.ndim - 2))
            both = torch.stack([turned.real, turned.imag], 1)
            changed[name] = both.flatten(0, 2).to(tensor.dtype)
    return changed


def _values_and_outputs(
    own: dict[str, Tensor], config: Any, options: LatentOptions, seen: LayerStatistics | None
) -> dict[str, Tensor]:
    """The tensors of one attention layer that make ``options.vo`` values a head and read them."""
    size, heads = head_dim(config), config.num_key_value_heads
    weight, bias = own["v_proj.weight"], own.get("v_proj.bias")
    inputs = torch.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else bias
    # A bias is one more column, for an input that is always 1.
    value = torch.cat([weight, inputs[:, None]], 1).double().view(heads, size, -1)
    out = own["o_proj.weight"].double()
    out = out.view(out.shape[0], heads, -1, size).permute(1, 2, 0, 3)  # [kv, group, hidden, size]
    moment = torch.eye(value.shape[-1], dtype=torch.float64)
    if options.values == "activations":
        assert seen is not None
        moment = seen.inputs / seen.inputs[-1, -1]
    made = [
        values.strided(v, o, options.vo)
        if options.values == "stride"
        else values.projected(v, o, options.vo, moment)
        for v, o in zip(value, out, strict=True)
    ]
    rows = torch.cat([v for v, _ in made]).to(weight.dtype)
    columns = torch.stack([o for _, o in made])  # [kv, group, hidden, vo]
    columns = columns.permute(2, 0, 1, 3).flatten(1).to(weight.dtype)
    changed = {"v_proj.weight": rows[:, :-1].contiguous(), "o_proj.weight": columns.contiguous()}
    if bias is not None:
        changed["v_proj.bias"] = rows[:, -1].contiguous()
    return changed

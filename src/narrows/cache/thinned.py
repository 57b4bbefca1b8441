"""Eviction, then codes: what stays of a prompt is quantised once, when it is sealed.

``spindle:keep=0.5+xquant``, ``snapkv+kivi:bits=4``. The first policy says which tokens stay, the
second how they are stored; a layer that neither lends nor borrows codes may hold them in the
first's codebook instead, if it has one (``cache.either``). A layer that reads another's codes keeps
the same tokens as that one, whose choice holds for both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from narrows.cache.budget import Choice
from narrows.cache.dense import DenseLayer
from narrows.cache.either import EitherLayer
from narrows.cache.evict import EvictPolicy, kept_at_most
from narrows.cache.evict_layer import EvictLayer
from narrows.cache.heads import GROWTH
from narrows.cache.plan import LayerPlan, QuantOptions
from narrows.cache.quantized import QuantLayer, QuantPolicy
from narrows.cache.scores import Scorer
from narrows.cache.spindle import SpindleLayer, SpindleOptions
from narrows.contracts import CachePolicy, LayerCache, LayerShape, ModelShape
from narrows.errors import ConfigError


class ThinnedLayer(QuantLayer):
    """A quantised layer that drops tokens of its prompt before it quantises the rest."""

    def __init__(
        self,
        plan: LayerPlan,
        options: QuantOptions,
        shape: LayerShape,
        model: ModelShape,
        key_owner: ThinnedLayer | None,
        value_owner: ThinnedLayer | None,
        prompt: EvictLayer,
    ) -> None:
        super().__init__(plan, options, shape, model.dtype, model.device, key_owner, value_owner)
        self.prompt: EvictLayer | None = prompt
        self.dense = prompt.prompt
        self.dropped = 0
        self.sealed_at = 0
        """Tokens read when it was sealed."""
        self.lends = False
        """Whether another layer reads these codes."""
        self.chosen: Choice | None = None
        """Of a layer that lends, until the borrower has been sealed with the same tokens."""

    @property
    def length(self) -> int:  # type: ignore[override]
        """See LayerCache: tokens read, those dropped since included."""
        return super().length + self.dropped

    @property
    def scorer(self) -> Scorer | None:
        """What looks on while the prompt is read."""
        return None if self.prompt is None else self.prompt.scorer

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """See LayerCache."""
        return super().attend(q, scale) if self.prompt is None else self.prompt.attend(q, scale)

    def seal(self) -> None:
        """See LayerCache. Raises NumericalError if what is kept is not finite."""
        if self.prompt is None or self.dense is None:
            return
        owners = {o for o in self.owners if isinstance(o, ThinnedLayer)}
        chosen = next((o.chosen for o in owners), None)
        if chosen is None:
            chosen = self.prompt.choice(self.prompt.options.keep)
        for owner in owners:
            owner.chosen = None
        self.chosen = chosen if self.lends else None
        tokens = torch.stack(chosen.tokens)[..., None]
        kept = DenseLayer(self.shape, self.dense.k.dtype, self.dense.k.device)
        pair = (x.take_along_dim(tokens, 1).transpose(0, 1) for x in (self.dense.k, self.dense.v))
        kept.append(*pair)
        self.dropped = self.dense.length - kept.length
        self.sealed_at = self.dense.length
        self.prompt, self.dense = None, kept
        super().seal()

    def rollback(self, n: int) -> None:
        """See LayerCache, and QuantLayer. Tokens of a prompt that was thinned cannot be given back:
        ValueError."""
        if self.dropped and n > self.length - self.sealed_at:
            raise ValueError(
                f"cannot roll back {n} of {self.length} tokens: the prompt, {self.sealed_at} of "
                "them, was thinned"
            )
        super().rollback(n)


UNEVEN = "leaves KV heads of a layer with different tokens"


@dataclass(frozen=True, slots=True)
class ThinnedPolicy:
    """``evict`` chooses tokens, ``quant`` stores them. See the module."""

    evict: EvictPolicy
    quant: QuantPolicy

    def __post_init__(self) -> None:
        options = self.evict.options
        for name, bad, why in (
            ("heads=per_query_head", options.heads == "per_query_head", UNEVEN),
            ("adaptive", options.adaptive, UNEVEN),
            ("target_bytes", options.target_bytes, "is counted in uncoded bytes"),
            ("cap", options.cap, "drops single tokens, but codes lie in groups of them"),
        ):
            if bad:
                raise ConfigError(
                    f"cache {self.spec!r}: {name} {why}, so it cannot be combined with codes"
                )
        thetas = [
            [getattr(x, f"theta_{side}", 1.0) for side in "kv"]
            for x in (options, self.evict.defaults)
        ]
        if self.chooses and thetas[0] != thetas[1]:
            raise ConfigError(
                f"cache {self.spec!r}: theta_k and theta_v follow from the error of the codes, so "
                "they cannot be given (but theta_k=1,theta_v=1, for codes in every layer)"
            )

    @property
    def chooses(self) -> bool:
        """Whether layers may hold a codebook in place of codes."""
        options = self.evict.options
        return isinstance(options, SpindleOptions) and max(options.theta_k, options.theta_v) < 1

    @property
    def spec(self) -> str:
        """See CachePolicy."""
        return f"{self.evict.spec}+{self.quant.spec}"

    @property
    def rehearses(self) -> bool:
        """See CachePolicy."""
        return self.evict.rehearses

    def holding(self, tokens: int) -> ThinnedPolicy:
        """See CachePolicy: codes are what must be taken back, or what is in a codebook."""
        evict = self.evict.holding(tokens) if self.chooses else self.evict
        return replace(self, evict=evict, quant=self.quant.holding(tokens))

    def build(self, shape: ModelShape) -> list[LayerCache]:
        """See CachePolicy."""
        options = self.quant.resolved(shape)
        plans = {plan.place: plan for plan in self.quant.plan(shape)}
        made: dict[int, ThinnedLayer] = {}
        layers = self.evict.build(shape)
        for place, layer in enumerate(layers):
            if not isinstance(layer, EvictLayer):
                continue
            plan = plans[place]
            key_owner, value_owner = (
                None if side.owner is None else made[side.owner] for side in (plan.key, plan.value)
            )
            for owner in (key_owner, value_owner):
                if owner is not None:
                    owner.lends = True
            facts = shape.layers[place]
            made[place] = ThinnedLayer(plan, options, facts, shape, key_owner, value_owner, layer)
        return [self._either(made.get(place, layer), layer) for place, layer in enumerate(layers)]

    def _either(self, layer: LayerCache, prompt: LayerCache) -> LayerCache:
        """``layer``, or a choice of it and a codebook if it shares no codes with another."""
        if not self.chooses or not isinstance(layer, ThinnedLayer) or layer.lends:
            return layer
        if layer.owners != (None, None) or not isinstance(prompt, SpindleLayer):
            return layer
        return EitherLayer(layer, prompt)

    def estimate(self, shape: ModelShape, tokens: int, prompt: int | None = None) -> int:
        """See CachePolicy."""
        if prompt is None:
            return self.evict.estimate(shape, tokens)
        kept = kept_at_most(self.evict.options, prompt, shape)
        new = tokens - prompt
        bound = self.quant.estimate(shape, new + kept, kept)
        if not self.chooses or not new:
            return bound
        # A codebook is no larger when it is chosen, but later tokens join it dense, in buffers
        # that may grow by a sixteenth at once.
        return bound + self.evict.estimate(shape, new + GROWTH + (kept + new) // GROWTH, 0)

    def nominal_bits(self, shape: ModelShape) -> float:
        """Bits of a code, see QuantPolicy."""
        return self.quant.nominal_bits(shape)


def combine(first: CachePolicy, second: CachePolicy) -> ThinnedPolicy:
    """``first+second``. Raises ConfigError, with the reason, for what cannot be combined."""
    spec = f"{first.spec}+{second.spec}"
    if isinstance(first, QuantPolicy) and isinstance(second, EvictPolicy):
        raise ConfigError(f"cache {spec!r}: eviction comes first; write it in front of the codes")
    if not isinstance(first, EvictPolicy) or not isinstance(second, QuantPolicy):
        raise ConfigError(
            f"cache {spec!r}: only an evicting policy and, behind it, a quantised one combine"
        )
    return ThinnedPolicy(first, second)

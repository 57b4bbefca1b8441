"""How one request picks its next token from the model's scores.

The steps and their order are those of vLLM's sampler: minimum length, logit bias, repetition,
frequency and presence penalty (``process``); then temperature, min-p, top-k, top-p, each on what
the one before left (``probabilities``); then one draw. Wherever scores are equal the lower token
id ranks higher, so a request's tokens depend on nothing but its scores and its seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from narrows.config import SamplingParams
from narrows.errors import ConfigError, NumericalError

Sampled = tuple[int, dict[int, float] | None]
"""A token id and, where asked for, log-probabilities by token id, best first."""


class Sampler:
    """The token choice of one request, with its own random number generator.

    Args:
        params: the request's settings.
        vocab_size: V, the length of a row of scores.
        eos_ids: the model's end tokens; like stop ids they are forbidden before ``min_tokens``.
        prompt_ids: the prompt, which the repetition penalty counts as already said.

    Raises ConfigError if a biased or a stop token is not in the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        eos_ids: frozenset[int],
        prompt_ids: Sequence[int],
    ) -> None:
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if wrong := [i for i in ids if not 0 <= i < vocab_size]:
                raise ConfigError(f"{name}: token {wrong[0]} is not in 0..{vocab_size - 1}")
        self.params = params
        self.greedy = params.temperature == 0.0
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        ends = eos_ids.union(params.stop_token_ids)
        self._ends = torch.tensor([i for i in sorted(ends) if i < vocab_size], dtype=torch.long)
        self._repeats = params.repetition_penalty != 1.0
        self._counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._prompt = sorted(set(prompt_ids)) if self._repeats else []
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    # ------------------------------------------------------------------- scores to probabilities

    def edits(self, generated: Sequence[int]) -> bool:
        """Whether any setting changes the scores of the token after ``generated``."""
        return bool(
            self.params.logit_bias
            or self._repeats
            or (self._counts and generated)
            or (len(generated) < self.params.min_tokens and len(self._ends))
        )

    def takes_best(self, generated: Sequence[int], ahead: Sequence[int] = ()) -> bool:
        """Whether the token after ``generated``, and after each more of ``ahead``, is just the
        best scored, with nothing to tell about it."""
        if not self.greedy or self.params.logprobs is not None:
            return False
        # Settings that begin to matter as a text grows, and those that cease to.
        return not self.edits(generated) and not (ahead and self.edits([*generated, *ahead]))

    def given_best(self, tokens: list[int], generated: Sequence[int]) -> list[int]:
        """The tokens taken where it ``takes_best`` after ``generated`` and these are best scored,
        place by place: they themselves."""
        return tokens

    def process(self, logits: Tensor, generated: Sequence[int]) -> Tensor:
        """Scores float32 ``[V]`` with minimum length, bias and penalties applied.

        Depends on nothing but its arguments, so it may be asked along any hypothetical
        ``generated``. Gives ``logits`` itself where no setting applies, else a new tensor.
        Raises NumericalError if a score is NaN or +inf, or all are -inf.
        """
        scores = self._edited(logits, generated) if self.edits(generated) else logits
        check_scores([float(scores.amax())])
        return scores

    def _edited(self, logits: Tensor, generated: Sequence[int]) -> Tensor:
        scores, device, p = logits.clone(), logits.device, self.params
        if len(generated) < p.min_tokens:
            scores[self._ends.to(device)] += -torch.inf  # added, so that a NaN stays one
        if p.logit_bias:
            scores[self._bias_ids.to(device)] += self._bias.to(device)
        said = torch.tensor(generated, dtype=torch.long)
        if self._repeats:
            ids = torch.cat([torch.tensor(self._prompt, dtype=torch.long), said]).to(device)
            old = scores[ids]
            r = p.repetition_penalty
            scores[ids] = torch.where(old > 0, old / r, old * r)
        if self._counts:
            counts = said.bincount(minlength=len(scores)).to(device)
            scores -= counts * p.frequency_penalty + (counts > 0) * p.presence_penalty
        return scores

    def probabilities(self, processed: Tensor) -> Tensor:
        """The distribution float64 ``[V]`` that tokens are drawn from, given ``process``'s scores.

        min-p keeps tokens at least ``min_p`` times as likely as the best one, top-k exactly the
        ``top_k`` best, top-p the fewest best ones that reach ``top_p`` of what is left.
        Temperature 0 puts everything on the best token.
        """
        p = self.params
        if self.greedy:
            one_hot = torch.zeros_like(processed, dtype=torch.float64)
            one_hot[processed.argmax()] = 1.0
            return one_hot
        scores = processed.double()
        weights = ((scores - scores.amax()) / p.temperature).exp()  # the best weighs 1
        if p.min_p > 0.0:
            weights = weights.where(weights >= p.min_p, 0.0)
        if 0 < p.top_k < len(weights):
            weights = _only(weights, _best(weights, p.top_k))
        if p.top_p < 1.0:
            weights = _only(weights, _nucleus(weights, p.top_p))
        return weights / weights.sum()

    # ------------------------------------------------------------------------------------ drawing

    def uniform(self) -> float:
        """The request's next random number in [0, 1): the same on every device."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def draw(self, probabilities: Tensor) -> int:
        """One token from ``probabilities`` ``[V]``, by inverting their running sum at
        ``uniform()``. A token of probability 0 is never drawn."""
        # On the CPU, where sums run left to right and so never fall. Rounding cannot bring the
        # target up to the whole sum either, since no uniform number is above 1 - 2**-53.
        sums = probabilities.cpu().cumsum(0)
        return int(torch.searchsorted(sums, sums[-1] * self.uniform(), right=True))

    def sample(self, logits: Tensor, generated: Sequence[int]) -> Sampled:
        """The token after ``generated``, given its scores float32 ``[V]``.

        Greedy takes the best and uses no random number; otherwise exactly one is used, whatever
        the settings. Raises NumericalError as ``process`` does.
        """
        processed = self.process(logits, generated)
        token = int(processed.argmax()) if self.greedy else self.draw(self.probabilities(processed))
        return token, self.logprobs(processed, token)

    def logprobs(self, processed: Tensor, token: int) -> dict[int, float] | None:
        """``params.logprobs`` best tokens of ``process``'s scores, then ``token`` if it is not
        among them; None where none were asked for."""
        if self.params.logprobs is None:
            return None
        logs = processed.log_softmax(0)
        best = _best(processed, self.params.logprobs).tolist()
        return {i: float(logs[i]) for i in dict.fromkeys([*best, token])}

    def state(self) -> Tensor:
        """The generator's state, to continue the same random numbers later."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Continue from a ``state()``."""
        self._generator.set_state(state)


def check_scores(best: Iterable[float]) -> None:
    """Refuse rows by their largest scores: NaN and +inf win a maximum, -inf only if alone."""
    if not all(map(math.isfinite, best)):
        raise NumericalError(
            "the model gave NaN or infinite next-token scores; "
            "try another dtype or check the weights"
        )


def _best(x: Tensor, k: int) -> Tensor:
    """Ids of the ``k`` largest of ``x`` ``[V]``, largest first, the lower id first among equals
    (which ``topk`` alone does not promise)."""
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=x.device)
    if k >= len(x):
        return x.sort(descending=True, stable=True).indices
    least = x.topk(k).values[-1]
    ids = (x >= least).nonzero()[:, 0]
    return ids[x[ids].sort(descending=True, stable=True).indices][:k]


def _nucleus(weights: Tensor, share: float) -> Tensor:
    """Ids of the fewest best tokens that hold ``share`` of all weight. A few dozen usually do,
    so the whole vocabulary is ranked only for a flat distribution."""
    enough = weights.sum() * share
    for k in (64, 1024, 8192, len(weights)):
        ids = _best(weights, k)
        sums = weights[ids].cumsum(0)
        if sums[-1] >= enough:
            break
    return ids[: int((sums < enough).sum()) + 1]


def _only(weights: Tensor, ids: Tensor) -> Tensor:
    """``weights`` at ``ids``, zero elsewhere."""
    kept = torch.zeros_like(weights)
    kept[ids] = weights[ids]
    return kept

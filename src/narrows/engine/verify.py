"""Which guessed tokens stay: one rule for every drafter, and no rule changes what is written.

A chosen guess (``Draft.probabilities`` None) stays if it is the very token that decoding without a
drafter would have taken there: greedy, or sampled with the request's own random numbers. So the
text is the same, to the token, as without a drafter. A drawn guess stays with probability
``min(1, p / q)``, and the first that falls is replaced by a draw from what p has above q
(Leviathan et al. 2023; sheet 6.5): the text then has the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from narrows.contracts import Draft
from narrows.engine.sampling import Sampled, Sampler, check_scores
from narrows.ops.native import row_maxima


def verify(
    sampler: Sampler, logits: Tensor, generated: Sequence[int], draft: Draft
) -> list[Sampled]:
    """The tokens a step commits, one to ``k + 1``: the guesses that stay, then one of the target's.

    ``logits`` float32 ``[k + 1, vocab_size]`` are the target's after the newest token and after
    each of the ``k`` guesses. Settings that look back see the guesses before each place. Raises
    NumericalError as ``Sampler.process``.
    """
    said = list(generated)
    committed: list[Sampled] = []
    for place, row in enumerate(logits):
        guess = draft.tokens[place] if place < len(draft.tokens) else None
        if draft.probabilities is None or guess is None:
            token, logprobs = sampler.sample(row, said)
        else:
            processed = sampler.process(row, said)
            token = settle(sampler, sampler.probabilities(processed), guess, draft, place)
            logprobs = sampler.logprobs(processed, token)
        committed.append((token, logprobs))
        if token != guess:
            break
        said.append(token)
    return committed


def settle(sampler: Sampler, target: Tensor, guess: int, draft: Draft, place: int) -> int:
    """``guess`` or its replacement, so that the outcome has distribution ``target`` float64
    ``[vocab_size]`` when the guess was drawn from ``draft.probabilities[place]``."""
    assert draft.probabilities is not None
    drawn_from = draft.probabilities[place].to(target)
    if sampler.uniform() * float(drawn_from[guess]) < float(target[guess]):
        return guess
    rest = (target - drawn_from).clamp_(min=0.0)
    # Rounding can leave nothing where the two are equal; then every draw would have stayed.
    return sampler.draw(rest if float(rest.sum()) > 0.0 else target)


class Scores(Protocol):
    """The target's scores of what follows rows, made as far as they are asked for."""

    def logits(self) -> Tensor:
        """All of them, float32 ``[n, vocab_size]``."""

    def best(self) -> tuple[Tensor, Tensor]:
        """``row_maxima`` of them, which may take less than making them all."""


def verify_batch(
    samplers: Sequence[Sampler],
    scores: Scores,
    generated: Sequence[Sequence[int]],
    drafts: Sequence[Draft],
) -> list[list[Sampled]]:
    """What ``verify`` gives for each sequence's rows of ``scores``, which lie end to end: one row
    more than its draft has tokens.

    All rows are checked, and the best token of each found, in one pass; greedy sequences that
    need nothing else are then done, and where all are such, no other score is asked for. Raises
    NumericalError before any random number is used if a row holds NaN or +inf or nothing but -inf.
    """
    simple = [
        draft.probabilities is None and sampler.takes_best(said, draft.tokens)
        for sampler, said, draft in zip(samplers, generated, drafts, strict=True)
    ]
    logits = None if all(simple) else scores.logits()
    values, indices = scores.best() if logits is None else row_maxima(logits)
    check_scores(values.tolist())
    best = indices.tolist()
    committed: list[list[Sampled]] = []
    start = 0
    for i, (sampler, draft) in enumerate(zip(samplers, drafts, strict=True)):
        stop = start + len(draft.tokens) + 1
        if logits is None or simple[i]:
            tokens, stay = sampler.given_best(best[start:stop], generated[i]), 0
            while stay < len(draft.tokens) and tokens[stay] == draft.tokens[stay]:
                stay += 1
            committed.append([(token, None) for token in tokens[: stay + 1]])
        else:
            committed.append(verify(sampler, logits[start:stop], generated[i], draft))
        start = stop
    return committed

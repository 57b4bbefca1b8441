"""Token choice by plain lists and loops, from the definitions."""

from __future__ import annotations

import math


def process(logits, generated, prompt, params, eos_ids):
    """Scores after minimum length, bias and penalties, as a list of floats."""
    scores = list(logits)
    if len(generated) < params.min_tokens:
        for token in {*eos_ids, *params.stop_token_ids}:
            scores[token] = -math.inf
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in range(len(scores)):
        if token in prompt or token in generated:
            if scores[token] > 0:
                scores[token] /= params.repetition_penalty
            else:
                scores[token] *= params.repetition_penalty
        times = sum(1 for t in generated if t == token)
        scores[token] -= params.frequency_penalty * times
        scores[token] -= params.presence_penalty if times else 0.0
    return scores


def probabilities(scores, params):
    """The distribution after temperature, min-p, top-k and top-p, as a list of floats."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    best = scores[ranked[0]]
    if params.temperature == 0:
        return [float(i == ranked[0]) for i in range(len(scores))]
    weight = {i: math.exp((scores[i] - best) / params.temperature) for i in ranked}
    kept = [i for i in ranked if weight[i] >= params.min_p * weight[ranked[0]]]
    if params.top_k:
        kept = kept[: params.top_k]
    whole = math.fsum(weight[i] for i in kept)
    nucleus, held = [], 0.0
    for i in kept:
        nucleus.append(i)
        held += weight[i] / whole
        if held >= params.top_p:
            break
    total = math.fsum(weight[i] for i in nucleus)
    return [weight[i] / total if i in nucleus else 0.0 for i in range(len(scores))]

"""From scores of word pieces to what a text encoder reads, with gradients (sheet section 3.4).

The best piece of each token is looked up in the encoder's embedding table, so that a clip is read
as text is. Backwards the choice counts as a softmax: no one-hot rows are ever made.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from narrows.retrieve.rank import Embedder

Adaptor = Literal["quantised", "soft"]
Reading = Literal["logits", "probs"]


def text_like(
    scores: Tensor,
    table: Tensor,
    special: Tensor,
    *,
    gamma: float = 0.1,
    reading: Reading = "logits",
    adaptor: Adaptor = "quantised",
) -> Tensor:
    """Embeddings ``[R, width]`` of the tokens that ``scores`` float ``[R, vocab]`` name.

    Args:
        scores: before any softmax.
        table: ``[vocab, width]``, a constant.
        special: bool ``[vocab]``, pieces that are never chosen and get no gradient.
        gamma: temperature of the softmax that gradients take.
        reading: what that softmax is of: the scores, or the probabilities they make, in which case
            it is always a soft one. The paper can be read either way.
        adaptor: "soft" mixes all pieces by their probabilities, without choosing; an ablation.
    """
    scores = scores.masked_fill(special, -math.inf)
    if adaptor == "soft":
        return scores.softmax(1) @ table
    if reading == "probs":
        scores = scores.softmax(1).masked_fill(special, -math.inf)
    chosen: Tensor = _Chosen.apply(scores, table, gamma)  # type: ignore[no-untyped-call]
    return chosen


class _Chosen(torch.autograd.Function):
    """Forward the table's rows of the highest scores, the lowest id where several are; backward
    the gradient of ``softmax(scores / gamma) @ table``."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, table: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(scores, table)
        ctx.gamma = gamma
        return table[scores.argmax(1)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, table = ctx.saved_tensors
        chances = (scores / ctx.gamma).softmax(1)
        slopes = grad @ table.T
        slopes = slopes - (chances * slopes).sum(1, keepdim=True)
        return chances * slopes / ctx.gamma, None, None


def read_as_text(embeds: Tensor, counts: list[int], encoder: Embedder) -> Tensor:
    """Unit vectors ``[B, width]`` of clips whose ``counts`` tokens lie end to end in ``embeds``
    ``[R, width]``, none of them empty, with gradients: what ``encoder`` makes of text of the same
    pieces, between the same special tokens."""
    ends = encoder.model.embeddings.word_embeddings.weight[
        [encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id]
    ]
    rows = [torch.cat([ends[:1], own, ends[1:]]) for own in torch.split(embeds, counts)]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    mask = torch.arange(batch.shape[1], device=embeds.device) < lengths[:, None]
    states = encoder.model(inputs_embeds=batch, attention_mask=mask.long()).last_hidden_state
    return encoder.pooled(states, mask)

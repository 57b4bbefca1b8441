"""A byte-level tokenizer that splits characters, a tiny model that reads it, and prepared texts."""

from __future__ import annotations

import functools

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from narrows.compression.base import Prepared
from narrows.compression.units import make_units, tokenize
from narrows.model.flat import FlatModel

PROSE = (
    "The ferry left Bergen at dawn, carrying 212 people. Nobody spoke of the storm.\r\n\r\n"
    "In 1907 the harbour froze; the old captain, Anna Lund, walked home over the ice.\r\n\r\n"
    "Fish is sold on Mondays. Bread is sold every day! Who sells the tea?\r\n\r\n"
)
MIXED = PROSE + "渡轮在黎明离开。没有人说话！👩‍👩‍👧 said: naïve cafe\u0301\tdone.\n\n"
# No character of several bytes, no CRLF, and no repeats whose scores would tie.
UNITS_OF_ONE = ". ".join(chr(97 + i * i * 7 % 26) + f"b{i * 37 % 101} dxe" for i in range(45))
VOCABULARY = 320


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and a few merges, so that most tokens are short and no text is unknown."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@functools.cache
def pair(family: str = "llama"):
    """``tiny.pair`` with the tokenizer."""
    flat, stock = tiny.pair(family, vocab_size=VOCABULARY)
    flat.tokenizer = tokenizer()
    return flat, stock


def chat_model() -> FlatModel:
    """The tiny model with a chat template, window 512."""
    flat, _ = pair()
    flat.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[answer] "
    )
    return flat


def prepare(text, keep=0.3, granularity="token", forced=()):
    """``text`` ready for choosing: a share of its tokens to keep, beside ``forced`` units."""
    tokens = tokenize(text, tokenizer())
    units = make_units(tokens, granularity)
    held = np.zeros(len(units), dtype=bool)
    held[list(forced)] = True
    budget = int(units.costs[held].sum()) + max(1, round(keep * int(units.costs[~held].sum())))
    return Prepared(tokens, units, held, budget)


def kept_text(prepared, kept):
    """The text of the kept units."""
    spans, bounds = prepared.tokens.spans, prepared.units.bounds
    return "".join(
        prepared.tokens.text[spans[bounds[u]][0] : spans[bounds[u + 1] - 1][1]]
        for u in np.flatnonzero(kept)
    )


def assert_within_one_unit(prepared, kept):
    """Forced units are there, and the cost lies within one unit of the budget."""
    costs = prepared.units.costs
    assert kept[prepared.forced].all()
    cost = int(costs[kept].sum())
    assert prepared.budget - int(costs.max()) < cost <= prepared.budget

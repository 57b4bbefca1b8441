"""Fast tokenizers of every kind that treats characters and offsets differently, trained here."""

from __future__ import annotations

import functools

from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The ferry left Bergen at dawn, carrying 212 people. Nobody spoke of the storm.",
    "In 1907 the harbour froze; the old captain, Anna Lund, walked home over the ice.",
    "渡轮在黎明离开。没有人说话！ naïve café 👩‍👩‍👧 🇳🇴",
]
SPECIAL = "<|im_start|>"
KINDS = ("bytes", "bytes-trimmed", "bytes-prefixed", "normalised", "wordpiece", "metaspace")

# Characters whose neighbours matter: joiners, flags, marks, jamo, right-to-left, astral, breaks.
AWKWARD = (
    "a b\t\n\r\n0.,'\"<|>é e\u0301 \u0300 ﬁ½ǅ 한글\u1100\u1161\u11a8 日本語 \u200d\u200c\ufe0f"
    "👩‍👩‍👧👍🏽🇳🇴🇫🇷 שָׁלוֹם \u0645\u064e नि क्षि 𝔘𐍈 \ufeff\x00\u2028\u0085"
)
texts = st.text(
    st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=60
) | st.lists(
    st.sampled_from(
        ["👩‍👩‍👧", "🇳🇴", "e\u0301", "\r\n", " the", "한", "न\u093f", "12", ". ", SPECIAL]
    ),
    max_size=25,
).map("".join)


@functools.cache
def make(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of KINDS."""
    alphabet: list[str] = []
    if kind == "wordpiece":  # drops whitespace and accents; unknown characters share one id
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer = normalizers.BertNormalizer()
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["[UNK]"], show_progress=False
        )
    elif kind == "metaspace":  # a space is part of the next word, and one is put in front
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        raw = Tokenizer(models.BPE())
        if kind == "normalised":
            raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes-prefixed")
        raw.decoder = decoders.ByteLevel()
        if kind == "bytes-trimmed":
            raw.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=340, initial_alphabet=alphabet, show_progress=False
        )
    raw.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw)
    made.add_special_tokens({"additional_special_tokens": [SPECIAL]})
    return made

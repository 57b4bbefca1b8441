"""A tiny text encoder with word pieces, a recogniser that writes in them, and a dual encoder."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from narrows.retrieve.clsr import ClsrConfig, Pieces, Recogniser
from narrows.retrieve.deliberation import PROMPT, Deliberation
from narrows.retrieve.dual import DualConfig, DualEncoder
from narrows.retrieve.rank import Embedder
from narrows.train.speech import Clip

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "the",
    "cat",
    "dog",
    "ferry",
    "left",
    "at",
    "night",
    "dawn",
    "captain",
    "walked",
    "home",
    "ice",
    "storm",
    "north",
    "wind",
]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
WIDTH, STATE = 24, 10


def embedder(seed: int = 0, pieces: tuple[str, ...] = ()) -> Embedder:
    """``pieces`` in place of the usual ones."""
    listed = pieces or (*SPECIAL, *WORDS, *LETTERS)
    ids = {piece: i for i, piece in enumerate(listed)}
    raw = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(piece, ids[piece]) for piece in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(ids),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return Embedder(BertModel(config, add_pooling_layer=False), tokenizer, max_tokens=64)


@functools.cache
def text_encoder() -> Embedder:
    return embedder()


def recogniser(seed: int = 0, **changes: object) -> Recogniser:
    pieces = Pieces.of(text_encoder())
    sizes = {"state_size": STATE, "width": WIDTH, "blocks": 2, "heads": 2, "inner": 32}
    config = ClsrConfig(
        **{**sizes, "vocab_size": len(pieces.table), "vocabulary": pieces.digest, **changes}
    )
    torch.manual_seed(seed)
    return Recogniser(config, pieces).eval()


def dual(seed: int = 0, **changes: object) -> DualEncoder:
    pieces = Pieces.of(text_encoder())
    sizes = {"state_size": STATE, "width": 16, "blocks": 2, "heads": 2, "inner": 32}
    config = DualConfig(
        **{**sizes, "text_width": WIDTH, "vocabulary": pieces.digest, "kernel": 3, **changes}
    )
    torch.manual_seed(seed)
    return DualEncoder(config, pieces).eval()


def whisper_weights(seed: int = 0, layers: int = 2) -> dict[str, torch.Tensor]:
    """Of a tiny Whisper decoder of as many tokens as ``whisper_tokenizer`` knows, by CTranslate2's
    names."""
    maker = torch.Generator().manual_seed(seed)
    inner, tokens = 3 * STATE, whisper_tokenizer().get_vocab_size()
    shapes = {"embeddings/weight": (tokens, STATE), "position_encodings/encodings": (64, STATE)}
    norms = ["layer_norm"]
    for i in range(layers):
        parts = {"self_attention": (3, 1), "attention": (1, 2, 1)}
        for part, widths in parts.items():
            for j, width in enumerate(widths):
                shapes[f"layer_{i}/{part}/linear_{j}/weight"] = (width * STATE, STATE)
        shapes[f"layer_{i}/ffn/linear_0/weight"] = (inner, STATE)
        shapes[f"layer_{i}/ffn/linear_1/weight"] = (STATE, inner)
        norms += [f"layer_{i}/{part}/layer_norm" for part in (*parts, "ffn")]
    for name, shape in list(shapes.items()):
        if "linear" in name:
            shapes[name.replace("weight", "bias")] = shape[:1]
    made = {name: torch.randn(shape, generator=maker) / 3 for name, shape in shapes.items()}
    for name in norms:
        made[f"{name}/gamma"] = 1 + torch.randn(STATE, generator=maker) / 3
        made[f"{name}/beta"] = torch.randn(STATE, generator=maker) / 3
    return {**made, "num_heads": torch.tensor(2, dtype=torch.int16)}


def whisper_tokenizer() -> Tokenizer:
    """A token for each letter, the blank, and each of a prompt."""
    listed = [*" abcdefghijklmnopqrstuvwxyz", *PROMPT]
    return Tokenizer(models.BPE({token: i for i, token in enumerate(listed)}, []))


def deliberation(seed: int = 0) -> Deliberation:
    weights = whisper_weights(seed)
    return Deliberation(weights, whisper_tokenizer(), Pieces.of(text_encoder())).eval()


def clips(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Random states."""
    maker = torch.Generator().manual_seed(seed)
    return [torch.randn(n, STATE, generator=maker) for n in lengths]


@dataclass
class Made:
    """Clips whose states spell their words: each word has a vector of its own, for a while."""

    clips: list[Clip]
    noise: float = 0.1

    def states(self, index: int) -> torch.Tensor:
        maker = torch.Generator().manual_seed(7)
        shapes = torch.randn(len(WORDS), STATE, generator=maker)
        long = torch.cat([shapes[w].expand(6 + w % 3, STATE) for w in self.places(index)])
        own = torch.Generator().manual_seed(index)
        return (long + self.noise * torch.randn(long.shape, generator=own)).half()

    def places(self, index: int) -> list[int]:
        """Which words a clip says."""
        return [WORDS.index(word) for word in self.clips[index].words.split()]

    def length(self, index: int) -> int:
        return len(self.states(index))


def speech(count: int = 8, seed: int = 0, length: int = 4) -> Made:
    """Each clip's question is its own words."""
    maker = torch.Generator().manual_seed(seed)
    clips = []
    for number in range(count):
        drawn = torch.randperm(len(WORDS), generator=maker)[:length].tolist()
        words = " ".join(WORDS[i] for i in drawn)
        clips.append(Clip(words, "", str(number), words, False))
    return Made(clips)


def spoken_data(folder: Path) -> Path:
    """A data folder with what ``narrows.train.spoken_text`` reads of it, filled."""

    def put(name: str, rows: list[dict[str, Any]]) -> None:
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    titles = [f"Place_{n}" for n in range(12)]
    passages, questions = [], []
    for n, title in enumerate(titles):
        text = f"the harbour of place {n} is very old. its tower fell in the year {1900 + n} alas."
        text += " many other things could be said about it and the people who live there today."
        passages.append({"pid": str(n), "title": title, "asr_wer23": text})
        questions.append({"pid": str(n), "question": f"q{n}", "answers": [f"{1900 + n}"]})
    put("spoken_squad/passages", passages)
    put("spoken_squad/questions", questions)
    put("xquad_en/xquad_en", [])
    put("lost_in_the_middle/nq_open_oracle", [])
    wiki = [
        {"title": t.replace("_", " "), "text": f"On {t} one more text is here."} for t in titles
    ]
    put("wiki_passages/passages", wiki)
    put("state_union/speeches", [{"id": "1", "text": "We are here today, my friends. No."}])
    return folder

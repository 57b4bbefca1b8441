"""Scoring texts against a question: by shared words, or by what an encoder makes of them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import bm25s
import numpy as np
import regex
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from narrows.errors import InputError, ModelError, reason
from narrows.model import hub
from narrows.model.pretrained import from_folder, weights_from_folder
from narrows.registry import Registry

ENCODER = "all-minilm-l6-v2"

Pooling = Literal["mean", "cls"]
POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
"""By their names in sentence-transformers' files."""

_WORD = regex.compile(
    r"(?V1)[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]"
    r"|[\w--[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]]+"
)


class Ranker(Protocol):
    """Tells how well each text answers a question."""

    def score(self, question: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """One score a text, ``[len(texts)]``; higher is better, the scale is the ranker's own.
        Raises InputError for an empty question."""


def words(text: str) -> list[str]:
    """Lower-case words of any language; of scripts written without spaces, the characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class BM25:
    """Okapi BM25 (Lucene's form) over the given texts, without stemming or stop words."""

    def __init__(self, *, k1: float = 1.5, b: float = 0.75) -> None:
        self.k1 = k1
        self.b = b

    def score(self, question: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """See Ranker. The word statistics are those of ``texts``; a text that shares no word
        with the question scores 0."""
        return self.over(texts)(question)

    def over(self, texts: Sequence[str]) -> Callable[[str], NDArray[np.float64]]:
        """``score`` for one question after the other about the same texts."""
        found = [words(text) for text in texts]
        known = {word for text in found for word in text}
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
        if known:
            index.index(found, show_progress=False)

        def score(question: str) -> NDArray[np.float64]:
            asked = [word for word in words(checked_question(question)) if word in known]
            if not asked:
                return np.zeros(len(texts))
            return np.asarray(index.get_scores(asked), dtype=np.float64)

        return score


class Embedder:
    """Sentence embeddings by a BERT encoder, and their cosine to the question's.

    Args:
        model: a transformers ``BertModel``.
        tokenizer: its tokenizer, with a padding token.
        batch: texts a forward pass.
        max_tokens: what of a text is read, special tokens included; the rest is not seen.
        pooling: a text's vector is the mean of its tokens' or, "cls", that of the first.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch: int = 32,
        max_tokens: int = 256,
        pooling: Pooling = "mean",
    ) -> None:
        self.pooling = pooling
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch = batch
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, name: str = ENCODER, *, device: str | None = None) -> Embedder:
        """Load an encoder by name (see ``narrows.model.hub.resolve``); ``device`` None takes
        CUDA where there is one. What sentence-transformers' files say of pooling is followed.
        Raises ModelError."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = hub.resolve(name)
        tokenizer = from_folder(AutoTokenizer, folder)
        model = weights_from_folder(BertModel, folder)
        return cls(model.to(device), tokenizer, pooling=_pooling(folder / "1_Pooling"))

    def pieces(self, text: str) -> list[int]:
        """Ids of the word pieces of a text, without special ones."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors ``[len(texts), hidden_size]``, see ``pooling``.

        Texts run in batches of like length; a text's vector does not depend on its neighbours
        beyond rounding.
        """
        return self._embed(
            [
                self.tokenizer.encode(text, truncation=True, max_length=self.max_tokens)
                for text in texts
            ]
        )

    @torch.inference_mode()
    def embed_pieces(self, pieces: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """``embed`` of texts given as ids of their word pieces, without special tokens: the very
        same vectors. Raises InputError for a text of more pieces than are read."""
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids = [[first, *own, last] for own in pieces]
        if (longest := max(map(len, ids), default=0)) > self.max_tokens:
            raise InputError(
                f"a text of {longest - 2} word pieces is longer than the {self.max_tokens - 2} "
                "that the encoder reads; cut it into shorter ones"
            )
        return self._embed(ids)

    def _embed(self, ids: list[list[int]]) -> NDArray[np.float32]:
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = np.zeros((len(ids), self.model.config.hidden_size), np.float32)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            vectors[chosen] = self._embed_batch([ids[i] for i in chosen])
        return vectors

    def _embed_batch(self, ids: list[list[int]]) -> NDArray[np.float32]:
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        states = self.model(**batch).last_hidden_state
        unit: NDArray[np.float32] = self.pooled(states, batch["attention_mask"]).cpu().numpy()
        return unit

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors float32 ``[B, hidden_size]`` of the encoder's last states ``[B, N,
        hidden_size]``, of which ``mask`` ``[B, N]`` are tokens."""
        states, real = states.float(), mask[:, :, None]
        one = states[:, 0] if self.pooling == "cls" else (states * real).sum(1) / real.sum(1)
        return torch.nn.functional.normalize(one, dim=-1)

    def score(self, question: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """See Ranker. Cosines, between -1 and 1."""
        asked, *found = self.embed([checked_question(question), *texts])
        return np.array([vector @ asked for vector in found], dtype=np.float64)


def _pooling(folder: Path) -> Pooling:
    """What ``folder`` of a sentence-transformers model says; the mean where there is none. Raises
    ModelError for a way that is not known here."""
    path = folder / "config.json"
    if not path.exists():
        return "mean"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        chosen = {name for name, on in told.items() if name.startswith("pooling_mode_") and on}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot read {path}: {reason(error)}") from None
    for name, pooling in POOLINGS.items():
        if chosen == {name}:
            return pooling
    raise ModelError(
        f"{path} asks for {', '.join(sorted(chosen)) or 'no pooling'}: only the mean of tokens or "
        "the first token can be taken"
    )


RANKERS: Registry[Callable[[], Ranker]] = Registry("ranker")
"""Name -> callable that makes the ranker with its defaults (loading its model, if it has one)."""

RANKERS.add("bm25", BM25)
RANKERS.add("minilm", Embedder.load)


def checked_question(question: str) -> str:
    """The question. Raises InputError if there is none."""
    if not question.strip():
        raise InputError("the question is empty: say what to look for")
    return question

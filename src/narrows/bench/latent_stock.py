"""Converted models as ``narrows export stock`` writes them, in engines that know nothing of us.

Our engine runs a converted model, theirs its export, all in float32: what differs is the order of
sums, and whatever another engine makes of the folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrows.bench.latent_models import Candidate
from narrows.bench.peers import TRANSFORMERS, VLLM, VLLM_STOCK
from narrows.bench.report import Row, absent_row, row
from narrows.cache.dense import DensePolicy
from narrows.config import SamplingParams
from narrows.errors import ConfigError
from narrows.latent import checkpoint
from narrows.latent.stock import export_stock
from narrows.llm import LLM

DTYPE = "float32"
PLAIN, SERVER = TRANSFORMERS.name, VLLM.packages[0]
"""The engines that exports are tried in."""

LARGEST = {PLAIN: ("max_logit_difference", "1"), SERVER: ("max_logprob_difference", "nats")}
"""How far an engine is from ours at the token where it is furthest, and the unit."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids: each token of ``text`` is predicted, and each of ``prompts`` is continued by
    ``new_tokens``."""

    text: list[int]
    prompts: list[list[int]]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What our engine makes of a sample: ``logits`` after each token of its text, float32
    ``[tokens, vocab_size]``, and ``tokens``, greedily written, behind each prompt."""

    logits: Tensor
    tokens: list[list[int]]


def stock_rows(
    candidates: Iterable[Candidate],
    source: Path,
    sample: Sample,
    *,
    vllm: bool,
    advance: Callable[[], None] = lambda: None,
    **where: Any,
) -> list[Row]:
    """Rows of how far the exports of ``candidates`` are from them: in transformers, and with
    ``vllm`` in vLLM, both on the CPU. Tokenizers are those of folder ``source``. What has no
    export, or no vLLM, has a row that says so. ``advance`` is called after each candidate. Raises
    ModelError if an engine refuses an export, InputError if the disk does."""
    engines = {PLAIN: None, SERVER: _why_no_vllm()} if vllm else {PLAIN: None}
    rows: list[Row] = []
    for candidate in candidates:
        named = {**where, "part": "stock", "dtype": DTYPE, "engine": candidate.engine}
        named |= {"method": candidate.method, "length": len(sample.text)}
        layer = candidate.model.shape.layers[0]
        if layer.key_dim == layer.value_dim:
            rows += _export_rows(candidate, source, sample, engines, named)
        else:
            why = f"keys have {layer.key_dim} numbers and values {layer.value_dim}"
            rows += [_absent(engine, why, named) for engine in engines]
        advance()
    return rows


def _export_rows(
    candidate: Candidate,
    source: Path,
    sample: Sample,
    engines: Mapping[str, str | None],
    named: dict[str, Any],
) -> list[Row]:
    """``engines`` by name, with why one is not here."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        converted, stock = Path(place, "converted"), Path(place, "stock")
        checkpoint.write(candidate.model.model, source, converted)
        export_stock(converted, stock)
        device = str(candidate.model.shape.device)
        ours = read(LLM(str(converted), draft="none", dtype=DTYPE, device=device), sample)
        for engine, why in engines.items():
            if why is not None:
                rows.append(_absent(engine, why, named))
            elif engine == PLAIN:
                rows += plain_rows(ours, stock, sample.text, **named)
            else:
                rows += server_rows(ours, stock, sample, **named)
    return rows


def read(llm: LLM, sample: Sample) -> Reading:
    """The sample in our engine."""
    states = llm.model.read(sample.text, DensePolicy().build(llm.model.shape))
    params = SamplingParams(max_tokens=sample.new_tokens, ignore_eos=True)
    written = llm.generate(sample.prompts, params)
    return Reading(llm.model.logits(states).cpu(), [done.token_ids for done in written])


def plain_rows(ours: Reading, stock: Path, text: Sequence[int], **named: Any) -> list[Row]:
    """Logits of the export in folder ``stock`` beside ours: the largest difference of each token's,
    and whether the likeliest next token is the same. Raises ModelError."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "logits.npy")
        model = str(stock.resolve())
        TRANSFORMERS.run({"model": model, "ids": list(text), "logits": str(file)})
        theirs = torch.from_numpy(np.load(file, allow_pickle=False))
    same = float((ours.logits.argmax(-1) == theirs.argmax(-1)).double().mean())
    far = (ours.logits - theirs).abs().amax(-1)
    return [
        _largest(PLAIN, far, named),
        row(
            "latent",
            metric="same_argmax",
            unit="share",
            value=same,
            interval=(same, same),
            spread="exact",
            n=len(text),
            versus=PLAIN,
            **named,
        ),
    ]


def server_rows(ours: Reading, stock: Path, sample: Sample, **named: Any) -> list[Row]:
    """The export in folder ``stock`` in vLLM beside ours: the share of each prompt's tokens before
    the first that differs, and how far the log-probability of each token of the text is off. Raises
    ConfigError or ModelError."""
    lengths = [len(sample.text) + 1, *(len(p) + sample.new_tokens for p in sample.prompts)]
    told = VLLM_STOCK.run(
        {
            "model": str(stock.resolve()),
            "dtype": DTYPE,
            "text": sample.text,
            "prompts": sample.prompts,
            "new_tokens": sample.new_tokens,
            "max_tokens": max(lengths),
        }
    )
    shares = [
        _agreed(mine, theirs) / sample.new_tokens
        for mine, theirs in zip(ours.tokens, told["tokens"], strict=True)
    ]
    truth = torch.tensor(sample.text[1:])[:, None]
    likely = ours.logits[:-1].log_softmax(-1).gather(-1, truth)[:, 0]
    off = (likely - torch.tensor(told["logprobs"])).abs()
    return [
        row(
            "latent",
            metric="same_tokens",
            unit="share",
            value=sum(shares) / len(shares),
            interval=(min(shares), max(shares)),
            spread="min-max",
            n=len(shares),
            decoded=sample.new_tokens,
            versus=SERVER,
            **named,
        ),
        _largest(SERVER, off, named),
    ]


def _largest(engine: str, differences: Tensor, named: dict[str, Any]) -> Row:
    """The largest of one difference a token, and their range."""
    metric, unit = LARGEST[engine]
    value = float(differences.max())
    return row(
        "latent",
        metric=metric,
        unit=unit,
        value=value,
        interval=(float(differences.min()), value),
        spread="min-max",
        n=len(differences),
        versus=engine,
        **named,
    )


def _absent(engine: str, why: str, named: dict[str, Any]) -> Row:
    metric, unit = LARGEST[engine]
    return absent_row("latent", metric=metric, unit=unit, why=why, versus=engine, **named)


def _agreed(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(mine, theirs, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(mine))


def _why_no_vllm() -> str | None:
    """None if vLLM's environment is there or could be made."""
    try:
        VLLM.environment()
    except ConfigError as error:
        return f"not here: {error}"
    return None

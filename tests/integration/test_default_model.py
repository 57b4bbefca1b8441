"""The default model, in float32: our engine against transformers' ``generate`` on real prompts."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from narrows.cache.dense import DensePolicy
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import Drafter
from narrows.data import find, read_rows
from narrows.draft.specs import make_drafter
from narrows.engine.engine import Engine
from narrows.model import hub
from narrows.model.flat import FlatModel

pytestmark = pytest.mark.model

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are:\n1.",
    "Q: Who wrote Hamlet?\nA:",
    "import numpy as np\n\nx = np.",
    "In 1969, humans first",
    "Translate to French: Good morning.",
    "The quick brown fox",
    "Ingredients:\n- 2 eggs\n- 200 g flour\n-",
    "It was the best of times,",
    "SELECT name FROM users WHERE",
    "The main difference between cats and dogs is",
    "日本の首都は",
    "To be or not to be,",
    "Photosynthesis is the process by which",
    "User: How do I learn to swim?\nAssistant:",
]
GREEDY = SamplingParams(max_tokens=16)
FULL = bool(os.environ.get("NARROWS_FULL"))
DRAFTED = (64, 160) if FULL else (8, 40)
"""Prompts, and tokens behind each, on which drafting is compared with plain decoding,"""
SIZES = (1, 8, 64) if FULL else (8,)
"""in batches of these sizes."""


def run(model: FlatModel, batch: list[list[int]], **limits: int) -> list[list[int]]:
    engine = Engine(model, DensePolicy(), EngineConfig(cache_bytes=1 << 30, **limits))
    requests = [engine.submit(p, GREEDY) for p in batch]
    for _ in engine.run():
        pass
    return [r.generated for r in requests]


def test_twenty_real_prompts_equal_generate(smollm: FlatModel) -> None:
    stock = AutoModelForCausalLM.from_pretrained(hub.resolve("smollm2-135m"), dtype=torch.float32)
    batch = [smollm.tokenizer(p)["input_ids"] for p in PROMPTS]
    expected = [
        stock.generate(
            torch.tensor([p]),
            attention_mask=torch.ones(1, len(p), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
        )[0, len(p) :].tolist()
        for p in batch
    ]
    assert [run(smollm, [p])[0] for p in batch] == expected
    ragged = [run(smollm, batch[i : i + 8], prefill_chunk=5) for i in range(0, 20, 8)]
    assert [tokens for part in ragged for tokens in part] == expected


def write(
    model: FlatModel, batch: list[list[int]], tokens: int, spec: str, drafter: Drafter | None
) -> tuple[list[list[int]], int]:
    """What is written, and guesses that were kept."""
    config = EngineConfig(cache_bytes=2 << 30, draft_tokens=3 if drafter else None)
    machine = Engine(model, parse_cache(spec), config, drafter)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    requests = [machine.submit(p, params) for p in batch]
    for _ in machine.run():
        pass
    return [r.generated for r in requests], sum(r.metrics.accepted_tokens for r in requests)


@pytest.mark.parametrize(
    ("spec", "count", "tokens"),
    [
        ("dense", *DRAFTED),
        ("kivi:bits=4,residual=32,group=32", 8, 60),
        ("xquant", 8, 60),
        ("spindle:preset=tuned,keep=0.8", 8, 40),
    ],
)
def test_drafting_changes_no_token(
    smollm: FlatModel, data_folder: Path, spec: str, count: int, tokens: int
) -> None:
    """NARROWS_FULL=1 writes 10,240 greedy tokens over 64 real prompts, which takes minutes."""
    rows = read_rows(find(data_folder, "spec_bench/question"))
    texts = list(itertools.islice((row["turns"][0] for row in rows), 0, None, 2))[:count]
    chats = [[{"role": "user", "content": text[:600]}] for text in texts]
    batch = [
        smollm.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)
        for c in chats
    ]
    kept = 0
    expected = write(smollm, batch, tokens, spec, None)[0]
    for size in SIZES:
        for first in range(0, count, size):
            some = slice(first, first + size)
            drafter = make_drafter("auto", smollm)
            got, right = write(smollm, batch[some], tokens, spec, drafter)
            assert got == expected[some]
            kept += right
    assert kept > 0

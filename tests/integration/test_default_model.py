"""The default model, in float32: our engine against transformers' ``generate`` on real prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from narrows.cache.dense import DensePolicy
from narrows.config import EngineConfig, SamplingParams
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

"""The engine writes what transformers' ``generate`` writes, however requests are batched."""

from __future__ import annotations

import pytest
import torch

from narrows.cache.dense import DensePolicy
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import FlatBatch
from narrows.engine.engine import Engine
from narrows.errors import NumericalError, RequestRejected
from tiny import FAMILIES, pair, prompts

GREEDY = SamplingParams(max_tokens=24)


def engine(family: str, window: int = 512, **limits: object) -> Engine:
    limits.setdefault("cache_bytes", 1 << 28)
    model = pair(family, max_position_embeddings=window)[0]
    return Engine(model, DensePolicy(), EngineConfig(**limits))


def run(machine: Engine, batch: list[list[int]], params: SamplingParams) -> list[list[int]]:
    requests = [machine.submit(p, params) for p in batch]
    for _ in machine.run():
        pass
    return [r.generated for r in requests]


def reference(family: str, prompt: list[int], params: SamplingParams) -> list[int]:
    out = pair(family)[1].generate(
        torch.tensor([prompt]), max_new_tokens=params.max_tokens, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_alone_and_in_a_ragged_batch(family: str) -> None:
    batch = prompts(20, seed=1)
    expected = [reference(family, p, GREEDY) for p in batch]
    assert [run(engine(family), [p], GREEDY)[0] for p in batch] == expected
    together = [run(engine(family), batch[i : i + 8], GREEDY) for i in range(0, 20, 8)]
    assert [tokens for part in together for tokens in part] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [5, 32])
def test_chunked_prefill_changes_nothing(family: str, chunk: int) -> None:
    batch = prompts(8, seed=2)
    whole = run(engine(family), batch, GREEDY)
    assert run(engine(family, prefill_chunk=chunk), batch, GREEDY) == whole


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_fast_path_equals_the_reference_path(family: str) -> None:
    flat = pair(family)[0]
    assert flat._fast is not None
    ids = torch.tensor(prompts(1, longest=200, seed=3)[0] * 2)
    positions = torch.arange(len(ids))
    spans = [(0, len(ids))]
    caches = [DensePolicy().build(flat.shape) for _ in range(2)]
    fast = flat.hidden(ids, positions, FlatBatch(spans, caches[:1]))
    slow = flat.reference_hidden(ids, positions, FlatBatch(spans, caches[1:]))
    torch.testing.assert_close(fast, slow, rtol=2e-4, atol=2e-4)


def test_bfloat16_fast_path_is_nearer_to_float32_than_the_reference_is() -> None:
    half, _ = pair("llama", torch.bfloat16)
    ids, spans = torch.tensor(prompts(1, seed=4)[0]), None
    positions = torch.arange(len(ids))
    spans = [(0, len(ids))]
    exact_model = pair("llama")[0]

    def states(model, path: str) -> torch.Tensor:  # type: ignore[no-untyped-def]
        caches = [DensePolicy().build(model.shape)]
        return getattr(model, path)(ids, positions, FlatBatch(spans, caches)).float()

    exact = states(exact_model, "hidden")
    fast = (states(half, "hidden") - exact).abs().mean()
    slow = (states(half, "reference_hidden") - exact).abs().mean()
    assert fast <= slow


SAMPLED = [
    SamplingParams(max_tokens=16, temperature=0.9, top_p=0.9, seed=11),
    SamplingParams(max_tokens=16, temperature=1.3, top_k=20, seed=12),
    SamplingParams(max_tokens=16, temperature=1.0, min_p=0.05, repetition_penalty=1.2, seed=13),
]


def test_a_seed_gives_the_same_text_whatever_the_batch() -> None:
    batch = prompts(3, seed=5)
    alone = [run(engine("llama"), [p], s)[0] for p, s in zip(batch, SAMPLED, strict=True)]
    machine = engine("llama", prefill_chunk=9)
    mates = [machine.submit(p, GREEDY) for p in prompts(5, seed=6)]
    requests = [machine.submit(p, s) for p, s in zip(batch, SAMPLED, strict=True)]
    for _ in machine.run():
        pass
    assert all(m.finish_reason for m in mates)
    assert [r.generated for r in requests] == alone
    other = SAMPLED[0].model_copy(update={"seed": 99})
    assert run(engine("llama"), batch[:1], other)[0] != alone[0]


def test_preemption_changes_no_token_and_is_counted() -> None:
    batch = prompts(6, longest=60, seed=7)
    params = [
        SamplingParams(max_tokens=150, temperature=0.8, seed=i, ignore_eos=True) for i in range(6)
    ]
    roomy = engine("llama")
    plenty = [roomy.submit(p, s) for p, s in zip(batch, params, strict=True)]
    for _ in roomy.run():
        pass
    shape = pair("llama")[0].shape
    tight = engine("llama", cache_bytes=DensePolicy().estimate(shape, 220) * 2)
    requests = [tight.submit(p, s) for p, s in zip(batch, params, strict=True)]
    for step in tight.run():
        held = sum(DensePolicy().estimate(shape, s.computed) for s in tight.scheduler.running)
        assert held <= tight.scheduler.cache_bytes
        assert step.running <= 6
    assert [r.generated for r in requests] == [r.generated for r in plenty]
    assert sum(r.metrics.preemptions for r in requests) > 0


def test_cancelling_one_request_leaves_the_others_alone() -> None:
    batch = prompts(3, seed=8)
    expected = run(engine("qwen3"), batch, GREEDY)
    machine = engine("qwen3")
    requests = [machine.submit(p, GREEDY) for p in batch]
    machine.step()
    machine.step()
    machine.cancel(requests[1])
    for _ in machine.run():
        pass
    assert requests[1].finish_reason == "cancelled"
    assert requests[0].generated == expected[0]
    assert requests[2].generated == expected[2]
    assert machine.cache_bytes == 0


def test_requests_that_can_never_run_are_refused() -> None:
    machine = engine("llama", cache_bytes=50_000)
    with pytest.raises(RequestRejected, match="no tokens"):
        machine.submit([], GREEDY)
    with pytest.raises(RequestRejected, match="shorten"):
        machine.submit([5] * 600, GREEDY)
    with pytest.raises(RequestRejected, match="cache bytes"):
        machine.submit([5] * 400, GREEDY)
    with pytest.raises(RequestRejected, match="vocabulary"):
        machine.submit([5, 1000], GREEDY)
    assert not machine.busy


def test_nan_logits_are_an_error_and_the_engine_survives() -> None:
    machine = engine("gpt2")
    weight = machine.model.model.transformer.wpe.weight
    kept = weight[3].clone()
    with torch.no_grad():
        weight[3] = float("nan")
    try:
        request = machine.submit([5] * 8, GREEDY)
        with pytest.raises(NumericalError):
            machine.step()
        assert request.finish_reason == "cancelled"
        assert not machine.busy
    finally:
        with torch.no_grad():
            weight[3] = kept
    assert run(machine, [[5] * 8], GREEDY)[0]


def test_stops_at_the_window_with_reason_length() -> None:
    machine = engine("llama")
    request = machine.submit([7] * 505, SamplingParams(max_tokens=100, ignore_eos=True))
    for _ in machine.run():
        pass
    assert request.finish_reason == "length"
    assert len(request.tokens) == 512


@pytest.mark.parametrize("chunk", [8000, 512])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prefill_makes_no_tensor_of_size_tokens_squared(family: str, chunk: int) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    n = 8000
    machine = engine(family, window=8192, prefill_chunk=chunk)
    machine.submit([5, 7] * (n // 2), SamplingParams(max_tokens=1))
    with Watch():
        for _ in machine.run():
            pass
    assert 0 < largest < n * n

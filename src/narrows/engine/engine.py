"""The engine: submit requests, step until they finish. Synchronous and single-threaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import CachePolicy
from narrows.engine import memory, runner
from narrows.engine.detokenize import StreamDecoder
from narrows.engine.sampling import Sampler, sample_batch
from narrows.engine.scheduler import Scheduler, Work
from narrows.engine.sequence import Sequence, State
from narrows.errors import RequestRejected
from narrows.model.flat import FlatModel


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did: ``pieces`` are (sequence, text that became final); the rest is for
    progress displays. ``seconds`` covers the forward pass and sampling."""

    pieces: list[tuple[Sequence, str]]
    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float


class Engine:
    """Continuous batching over one model with one cache policy.

    Args:
        model: the loaded model.
        policy: builds each sequence's caches.
        config: limits; the byte budget is fixed here, from free memory if none is given.
    """

    def __init__(self, model: FlatModel, policy: CachePolicy, config: EngineConfig) -> None:
        self.model = model
        self.policy = policy
        budget = config.cache_bytes
        if budget is None:
            budget = int(memory.free_bytes(model.shape.device) * config.cache_share)
        self.scheduler = Scheduler(
            model.shape, policy, config, budget, lambda: policy.build(model.shape)
        )
        self._count = 0

    def submit(self, prompt: list[int], params: SamplingParams) -> Sequence:
        """Queue a request of prompt token ids. Raises RequestRejected if it can never run."""
        vocabulary = self.model.shape.vocab_size
        wrong = next((t for t in prompt if not 0 <= t < vocabulary), None)
        if wrong is not None:
            raise RequestRejected(f"token id {wrong} is outside the vocabulary of {vocabulary}")
        sampler = Sampler(params, vocabulary, self.model.eos_ids, prompt)
        tokenizer = self.model.tokenizer
        decoder = None
        if tokenizer is not None:
            decoder = StreamDecoder(tokenizer, params.stop, min_tokens=params.min_tokens)
        sequence = Sequence(self._count, prompt, params, sampler, decoder)
        self.scheduler.submit(sequence)
        self._count += 1
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a request now; its text so far stays. Does nothing if it has ended."""
        if sequence.state is not State.FINISHED:
            self.scheduler.remove(sequence)
            sequence.finish("cancelled")

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes the caches of all running sequences hold now."""
        return sum(s.cache_bytes for s in self.scheduler.running)

    def step(self) -> Step:
        """Read the planned tokens and sample where a sequence is ready. If the forward pass or
        the sampling fails, the sequences of this step are cancelled and the error raised."""
        started = time.perf_counter()
        work = self.scheduler.plan()
        try:
            pieces = self._advance(work)
        except BaseException:
            for item in work:
                self.cancel(item.sequence)
            raise
        running = self.scheduler.running
        return Step(
            pieces=pieces,
            running=len(running),
            waiting=len(self.scheduler.waiting),
            prompt_tokens=sum(w.count for w in work) - len(pieces),
            generated_tokens=len(pieces),
            seconds=time.perf_counter() - started,
        )

    def run(self, on_step: Callable[[Step], None] | None = None) -> Iterator[Step]:
        """Step until nothing is left, giving each step (first to ``on_step``)."""
        while self.busy:
            step = self.step()
            if on_step is not None:
                on_step(step)
            yield step

    def _advance(self, work: list[Work]) -> list[tuple[Sequence, str]]:
        if not work:
            return []
        ready, logits = runner.forward(self.model, work)
        for item in work:
            if item.sequence.computed >= item.sequence.prompt_length:
                item.sequence.seal()
        if not ready:
            return []
        samples = sample_batch([s.sampler for s in ready], logits, [s.generated for s in ready])
        pieces = []
        for sequence, (token, logprobs) in zip(ready, samples, strict=True):
            text = sequence.accept(token, logprobs)
            reason = self._finish_reason(sequence, token)
            if reason:
                self.scheduler.remove(sequence)
                text += sequence.finish(reason)
            pieces.append((sequence, text))
        return pieces

    def _finish_reason(self, sequence: Sequence, token: int) -> str:
        params = sequence.params
        if token in params.stop_token_ids:
            return "stop"
        if token in self.model.eos_ids and not params.ignore_eos:
            return "stop"
        if sequence.decoder is not None and sequence.decoder.stopped:
            return "stop"
        limit = min(sequence.prompt_length + params.max_tokens, self.model.shape.max_tokens)
        return "length" if len(sequence.tokens) >= limit else ""

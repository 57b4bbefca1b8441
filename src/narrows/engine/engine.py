"""The engine: submit requests, step until they finish. Synchronous and single-threaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.cache.rehearse import rehearse
from narrows.cache.saved import SavedCache
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import CachePolicy, Draft, Drafter, Kept, Reading
from narrows.engine import memory, runner
from narrows.engine.detokenize import StreamDecoder
from narrows.engine.sampling import Sampled, Sampler
from narrows.engine.scheduler import Scheduler, Work
from narrows.engine.sequence import Sequence, State
from narrows.engine.speculation import DraftingPolicy, Speculation
from narrows.engine.verify import verify_batch
from narrows.errors import ConfigError, RequestRejected
from narrows.model.flat import FlatModel
from narrows.ops.native import few_rows, rows_at_once


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


class Move(NamedTuple):
    """What a step gave one sequence: tokens, and the text that became final; ``drafted`` guesses
    were verified for it."""

    sequence: Sequence
    tokens: list[int]
    text: str
    drafted: int


@dataclass(frozen=True, slots=True)
class _Scores:
    """See ``verify.Scores``: of ``states``, made in ``room`` if there is any."""

    model: FlatModel
    states: Tensor
    room: Tensor | None

    def logits(self) -> Tensor:
        return self.model.logits(self.states, self.room)

    def best(self) -> tuple[Tensor, Tensor]:
        return self.model.best(self.states, self.room)


def _reading(item: Work) -> Reading:
    sequence, start = item.sequence, item.sequence.computed
    return Reading(sequence.number, start, start + item.count, len(sequence.tokens))


class Engine:
    """Continuous batching over one model with one cache policy.

    Args:
        model: the loaded model.
        policy: builds each sequence's caches.
        config: limits; the byte budget is fixed here, from free memory if none is given.
        drafter: guesses tokens ahead; None decodes one at a time. What is written is the same.
    """

    def __init__(
        self,
        model: FlatModel,
        policy: CachePolicy,
        config: EngineConfig,
        drafter: Drafter | None = None,
    ) -> None:
        self.model = model
        ahead = drafter.most if drafter else 0
        if drafter:
            policy = DraftingPolicy(policy, drafter).holding(ahead)
        self.policy = policy
        self.drafter = drafter
        self.speculation = None
        if drafter:
            together = rows_at_once(model.head)
            self.speculation = Speculation(drafter, config.draft_tokens, together)
        budget = config.cache_bytes
        if budget is None:
            budget = int(memory.free_bytes(model.shape.device) * config.cache_share)
        self.scheduler = Scheduler(
            model.shape, policy, config, budget, lambda: policy.build(model.shape), ahead
        )
        self._count = 0
        self._room = torch.empty(0) if few_rows(1, model.head) else None
        """For logits to be made in, of as many rows as any step has had."""

    def submit(
        self, prompt: list[int], params: SamplingParams, saved: SavedCache | None = None
    ) -> Sequence:
        """Queue a request of prompt token ids, which follow those that ``saved`` has read. Raises
        RequestRejected if it can never run, ConfigError if it cannot go on from ``saved``."""
        vocabulary = self.model.shape.vocab_size
        if saved is not None:
            self.check_saved(saved)
            prompt = [*saved.tokens, *prompt]
            if len(prompt) == len(saved.tokens):
                raise RequestRejected("a saved cache needs at least one token to go on with")
        wrong = next((t for t in prompt if not 0 <= t < vocabulary), None)
        if wrong is not None:
            raise RequestRejected(f"token id {wrong} is outside the vocabulary of {vocabulary}")
        sampler = Sampler(params, vocabulary, self.model.eos_ids, prompt)
        tokenizer = self.model.tokenizer
        decoder = None
        if tokenizer is not None:
            decoder = StreamDecoder(tokenizer, params.stop, min_tokens=params.min_tokens)
        window = self.model.shape.max_tokens
        sequence = Sequence(self._count, prompt, params, window, sampler, decoder, saved)
        self.scheduler.submit(sequence)
        self._count += 1
        return sequence

    def read(self, prompt: list[int]) -> SavedCache:
        """Read a prompt and give its sealed caches, for requests to go on from; other requests are
        served meanwhile. Raises as ``submit``."""
        window = self.model.shape.max_tokens
        if len(prompt) > window - 2:
            raise RequestRejected(
                f"the prompt has {len(prompt)} tokens, which leaves nothing of the model's "
                f"{window} to go on with; shorten or compress it"
            )
        sequence = self.submit(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        try:
            while not sequence.sealed:
                self.step()
            assert sequence.caches is not None
            return SavedCache(
                tuple(prompt),
                sequence.caches,
                self.policy.spec,
                self.model.fingerprint,
                str(self.model.shape.dtype),
            )
        finally:
            self.cancel(sequence)

    def check_saved(self, saved: SavedCache) -> None:
        """Raises ConfigError if no request of this engine could go on from ``saved``."""
        if saved.model != self.model.fingerprint:
            raise ConfigError(
                f"the saved cache is of another model (fingerprint {saved.model}, but "
                f"{self.model.name} has {self.model.fingerprint})"
            )
        if saved.dtype != str(self.model.shape.dtype):
            raise ConfigError(
                f"the saved cache holds {saved.dtype}, but the model runs in "
                f"{self.model.shape.dtype}; load it in the same"
            )
        if saved.spec != self.policy.spec:
            held = parse_cache(saved.spec).holding(self.scheduler.ahead)
            if self.drafter and held.spec == self.policy.spec:
                raise ConfigError(
                    "the saved cache cannot take drafts back; use draft='none', or save it anew "
                    f"with drafter {self.drafter.name!r}"
                )
            raise ConfigError(
                f"the saved cache is {saved.spec!r}, but this engine's caches are "
                f"{self.policy.spec!r}; load the model with cache={saved.spec!r}"
            )

    def cancel(self, sequence: Sequence) -> None:
        """End a request now; its text so far stays. Does nothing if it has ended."""
        if sequence.state is not State.FINISHED:
            self._end(sequence, "cancelled")

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
        the sampling fails, the sequences of this step are cancelled and the error raised; likewise
        one that cannot enter the batch."""
        started = time.perf_counter()
        try:
            work = self.scheduler.plan()
        except BaseException:
            if self.scheduler.waiting:
                self.cancel(self.scheduler.waiting[0])
            raise
        try:
            moved = self._advance(work)
        except BaseException:
            for item in work:
                self.cancel(item.sequence)
            raise
        running = self.scheduler.running
        seconds = time.perf_counter() - started
        read = sum(w.count for w in work)
        if self.speculation and work:
            self.speculation.observe(read + sum(m.drafted for m in moved), seconds)
        for m in moved:
            if m.text:
                m.sequence.news.append(m.text)
        written = sum(len(m.tokens) for m in moved)
        return Step(
            pieces=[(m.sequence, m.text) for m in moved],
            running=len(running),
            waiting=len(self.scheduler.waiting),
            prompt_tokens=read - len(moved),
            generated_tokens=written,
            seconds=seconds,
        )

    def run(self, on_step: Callable[[Step], None] | None = None) -> Iterator[Step]:
        """Step until nothing is left, giving each step (first to ``on_step``)."""
        while self.busy:
            step = self.step()
            if on_step is not None:
                on_step(step)
            yield step

    @torch.inference_mode()
    def _advance(self, work: list[Work]) -> list[Move]:
        if not work:
            return []
        drafts = [Draft([])] * len(work)
        if self.speculation:
            drafts = self.speculation.drafts(work)
        taps: tuple[int, ...] = ()
        wanted: list[int] = []
        if self.drafter and self.drafter.taps:
            taps, wanted = self.drafter.taps, self.drafter.wants(list(map(_reading, work)))
        done = runner.forward(self.model, work, drafts, taps, wanted)
        for item in work:
            if item.sequence.computed >= item.sequence.prompt_length:
                self._seal(item.sequence)
        moved = self._verify(work, drafts, done) if done.ready else []
        if self.drafter and done.taps is not None:
            kept = []
            for item, start, (first, stop) in zip(work, wanted, done.seen, strict=True):
                if first < stop and item.sequence.state is State.RUNNING:
                    stays = item.sequence.computed - start
                    kept.append(Kept(item.sequence.number, start, first, first + stays))
            self.drafter.read(done.taps, kept)
        return moved

    def _seal(self, sequence: Sequence) -> None:
        """Let the caches of a sequence whose prompt has been read compress it, once."""
        if sequence.sealed:
            return
        if self.policy.rehearses and sequence.caches is not None:
            rehearse(self.model, sequence.caches, sequence.tokens[: sequence.prompt_length])
        sequence.seal()

    def _verify(self, work: list[Work], drafts: list[Draft], done: runner.Pass) -> list[Move]:
        """Commit what the target says to each sequence that is ready, and take the rest back."""
        sequences = [work[i].sequence for i in done.ready]
        tried = [drafts[i] for i in done.ready]
        size = len(done.states) * self.model.shape.vocab_size
        if self._room is not None and self._room.numel() < size:
            self._room = torch.empty(size)
        scores = _Scores(self.model, done.states, self._room)
        committed = verify_batch(
            [s.sampler for s in sequences], scores, [s.generated for s in sequences], tried
        )
        moved = []
        for sequence, draft, samples in zip(sequences, tried, committed, strict=True):
            if self.speculation:  # before the sequence may end and be forgotten
                self.speculation.learn(sequence, draft, len(samples) - 1)
            tokens, text = self._accept(sequence, samples)
            sequence.settle(len(draft.tokens), len(tokens) - 1)
            moved.append(Move(sequence, tokens, text, len(draft.tokens)))
        return moved

    def _accept(self, sequence: Sequence, samples: list[Sampled]) -> tuple[list[int], str]:
        """Commit tokens up to the one that ends the request."""
        tokens, text = [], ""
        for token, logprobs in samples:
            tokens.append(token)
            text += sequence.accept(token, logprobs)
            reason = self._finish_reason(sequence, token)
            if reason:
                text += self._end(sequence, reason)
                break
        return tokens, text

    def _end(self, sequence: Sequence, reason: str) -> str:
        self.scheduler.remove(sequence)
        if self.speculation:
            self.speculation.forget(sequence)
        return sequence.finish(reason)

    def _finish_reason(self, sequence: Sequence, token: int) -> str:
        params = sequence.params
        if token in params.stop_token_ids:
            return "stop"
        if token in self.model.eos_ids and not params.ignore_eos:
            return "stop"
        if sequence.decoder is not None and sequence.decoder.stopped:
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.limit else ""

"""Who runs in the next step, and how many tokens each reads. Holds no tensors.

Admission is in bytes. A request enters when its tokens so far fit beside those running; if the
running ones later outgrow the budget, the newest gives its cache back and waits at the front.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from narrows.config import EngineConfig
from narrows.contracts import CachePolicy, LayerCache, ModelShape
from narrows.engine.sequence import Sequence
from narrows.errors import RequestRejected


@dataclass(frozen=True, slots=True)
class Work:
    """``count`` tokens of ``sequence`` to read in one step, from its first uncached one."""

    sequence: Sequence
    count: int


class Scheduler:
    """Queues and byte budget of one engine.

    Args:
        shape: the model.
        policy: what caches cost.
        config: limits.
        cache_bytes: the byte budget in force.
        build: makes the empty caches of a sequence that enters.
        ahead: tokens a step may cache beyond those it commits.
    """

    def __init__(
        self,
        shape: ModelShape,
        policy: CachePolicy,
        config: EngineConfig,
        cache_bytes: int,
        build: Callable[[], list[LayerCache]],
        ahead: int = 0,
    ) -> None:
        self.shape = shape
        self.policy = policy
        self.config = config
        self.cache_bytes = cache_bytes
        self.build = build
        self.ahead = ahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def submit(self, sequence: Sequence) -> None:
        """Queue a request. Raises RequestRejected if it could never run here."""
        prompt, window = sequence.prompt_length, self.shape.max_tokens
        if prompt == 0:
            raise RequestRejected("the prompt has no tokens; give at least one")
        if prompt >= window:
            raise RequestRejected(
                f"the prompt has {prompt} tokens but the model takes {window} with the answer; "
                "shorten or compress it"
            )
        longest = sequence.limit + self.ahead
        need = self.policy.estimate(self.shape, longest, sequence.sealed_tokens)
        if not sequence.saved:
            need = max(need, self.policy.estimate(self.shape, prompt))
        if need > self.cache_bytes:
            raise RequestRejected(
                f"the request may need {need:,} cache bytes but the budget is "
                f"{self.cache_bytes:,}; lower max_tokens or raise the budget"
            )
        self.waiting.append(sequence)

    def plan(self) -> list[Work]:
        """The next step: one token of every sequence that decodes, and prompt chunks up to
        ``prefill_chunk`` tokens in all, oldest first. Empty when there is nothing to do."""
        self._shrink()
        self._admit()
        left = self.config.prefill_chunk
        work = []
        for sequence in self.running:
            count = sequence.pending
            if not sequence.sealed:  # one read again is sealed where it was the first time
                count = min(count, sequence.prompt_length - sequence.computed)
            if count > 1:
                count = min(count, left)
                left -= count
            if count:
                work.append(Work(sequence, count))
        return work

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, wherever it stands."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _cost(self, sequence: Sequence) -> int:
        longest = len(sequence.tokens) + 1 + self.ahead
        prompt = sequence.sealed_tokens
        cost = self.policy.estimate(self.shape, longest, prompt)
        if sequence.sealed or sequence.saved:
            return cost
        return max(cost, self.policy.estimate(self.shape, prompt))

    def _shrink(self) -> None:
        if len(self.running) <= 1:
            return
        used = sum(map(self._cost, self.running))
        while used > self.cache_bytes and len(self.running) > 1:
            newest = self.running.pop()
            used -= self._cost(newest)
            newest.preempt()
            self.waiting.appendleft(newest)

    def _admit(self) -> None:
        if not self.waiting or len(self.running) >= self.config.max_sequences:
            return
        used = sum(map(self._cost, self.running))
        while self.waiting and len(self.running) < self.config.max_sequences:
            used += self._cost(self.waiting[0])
            if used > self.cache_bytes and self.running:
                return
            sequence = self.waiting[0]
            sequence.start(self.build)  # may fail, and then it still waits
            self.running.append(self.waiting.popleft())

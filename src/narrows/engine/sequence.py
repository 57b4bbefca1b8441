"""One request as the engine sees it: tokens, cache, sampling state, progress."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from enum import Enum

from narrows.cache.saved import SavedCache
from narrows.config import SamplingParams
from narrows.contracts import Completion, LayerCache, RequestMetrics
from narrows.engine.detokenize import StreamDecoder
from narrows.engine.sampling import Sampler


class State(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request. ``tokens`` is the prompt followed by what was generated; ``caches`` hold the
    keys and values of its first ``computed`` tokens while it runs, and are None otherwise.
    ``saved`` has read the first tokens of the prompt, so that the rest follows its caches. It ends
    at ``limit`` tokens at most, prompt included, none beyond the model's ``window``."""

    def __init__(
        self,
        number: int,
        prompt: list[int],
        params: SamplingParams,
        window: int,
        sampler: Sampler,
        decoder: StreamDecoder | None,
        saved: SavedCache | None = None,
    ) -> None:
        self.number = number
        self.saved = saved
        self.params = params
        self.sampler = sampler
        self.decoder = decoder
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.limit = min(len(prompt) + params.max_tokens, window)
        self.caches: list[LayerCache] | None = None
        self.sealed = False
        self.state = State.WAITING
        self.finish_reason = ""
        self.news: list[str] = []
        """Pieces of final text that nobody has taken yet."""
        self.logprobs: list[dict[int, float]] | None = None if params.logprobs is None else []
        self.metrics = RequestMetrics(prompt_tokens=len(prompt))
        self._submitted = time.perf_counter()
        self._admitted = 0.0
        self._first_token = 0.0

    @property
    def generated(self) -> list[int]:
        """Token ids produced so far."""
        return self.tokens[self.prompt_length :]

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are cached."""
        return self.caches[0].length if self.caches else 0

    @property
    def pending(self) -> int:
        """Tokens the next forward passes must still read before a new one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def sealed_tokens(self) -> int:
        """Tokens after which its caches are, or will be, sealed."""
        return len(self.saved.tokens) if self.saved else self.prompt_length

    @property
    def cache_bytes(self) -> int:
        """Bytes its caches hold now."""
        return sum(c.nbytes for c in self.caches or ())

    def start(self, build: Callable[[], list[LayerCache]]) -> None:
        """Enter the batch with the empty caches that ``build`` makes, or copies of saved ones."""
        self.caches = copy.deepcopy(self.saved.caches) if self.saved else build()
        self.sealed, self.state = self.saved is not None, State.RUNNING
        if self.sealed:
            self.metrics.sealed_bytes = self.cache_bytes
        if not self._admitted:
            self._admitted = time.perf_counter()
            self.metrics.queued_s = self._admitted - self._submitted

    def seal(self) -> None:
        """Tell the caches that the prompt has been read."""
        self._note_peak()
        for cache in self.caches or ():
            cache.seal()
        self.sealed = True
        self.metrics.sealed_bytes = self.cache_bytes

    def preempt(self) -> None:
        """Give the cache back and wait; tokens and random state are kept, so the text goes on
        exactly where it stopped once its tokens have been read again."""
        self._note_peak()
        self.caches, self.sealed, self.state = None, False, State.WAITING
        self.metrics.preemptions += 1

    def accept(self, token: int, logprobs: dict[int, float] | None) -> str:
        """Take a sampled token; returns the text that became final."""
        now = time.perf_counter()
        if not self._first_token:
            self._first_token = now
            self.metrics.prefill_s = now - self._admitted
        self.tokens.append(token)
        self.metrics.generated_tokens += 1
        self.metrics.decode_s = now - self._first_token
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.append(logprobs)
        if self.decoder is None or token in self.params.stop_token_ids:
            return ""
        return self.decoder.push(token)

    def settle(self, drafted: int, kept: int) -> None:
        """Count a step that read ``drafted`` guesses, of which ``kept`` were committed, and take
        the others out of the caches."""
        self.metrics.steps += 1
        self.metrics.drafted_tokens += drafted
        self.metrics.accepted_tokens += kept
        surplus = self.computed - len(self.tokens) + 1
        for cache in (self.caches or ()) if surplus > 0 else ():
            cache.rollback(surplus)

    def finish(self, reason: str) -> str:
        """End with ``reason``; returns the text still held back."""
        self._note_peak()
        self.state, self.finish_reason, self.caches = State.FINISHED, reason, None
        return self.decoder.flush() if self.decoder else ""

    def _note_peak(self) -> None:
        # Caches only grow between these moments, so looking here sees every peak.
        self.metrics.cache_bytes = max(self.metrics.cache_bytes, self.cache_bytes)

    def completion(self) -> Completion:
        """The result so far."""
        return Completion(
            text=self.decoder.text if self.decoder else "",
            token_ids=self.generated,
            finish_reason=self.finish_reason,
            metrics=self.metrics,
            logprobs=self.logprobs,
        )

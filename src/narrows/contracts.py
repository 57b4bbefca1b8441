"""The protocols and shared records that packages speak to each other with.

Tensors are token-major: queries ``[n, heads, key_dim]``, keys ``[n, kv_heads, key_dim]``,
values ``[n, kv_heads, value_dim]``, where ``n`` counts tokens of one sequence.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from narrows.errors import InputError
from narrows.ops import packed, ragged
from narrows.ops.packed import PackedLayer
from narrows.ops.places import Places
from narrows.ops.ragged import Place

Span = tuple[int, int]
"""Half-open character (or token) range ``[start, end)`` in the original text."""


# ------------------------------------------------------------------------------ model and cache


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a cache must know of one decoder layer. ``window`` is None for full attention,
    else the number of newest tokens (the query's own included) a query may see."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def numbers(self) -> int:
        """How many numbers the keys and values of one token are."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class Rotary(Protocol):
    """How a model's full-attention layers turn keys and queries by their places."""

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 ``[n, key_dim]`` of positions int64 ``[n]``; 1 and 0 for a
        model that knows places otherwise."""

    def steps(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 ``[count, key_dim / 2]``, at least, of turning by 0, 1, ...
        places, without the scale that some models put into their tables."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What caches, the scheduler and error messages need to know of a model. ``rotary`` is None
    where only its sizes are known."""

    family: str
    layers: tuple[LayerShape, ...]
    heads: int
    hidden_size: int
    vocab_size: int
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    rotary: Rotary | None = field(default=None, compare=False, repr=False)


class LayerCache(ABC):
    """Keys and values of one decoder layer of one sequence.

    ``append`` then ``attend`` is one step: the ``n`` queries are the newest ``n`` tokens.
    """

    length: int
    """Tokens the model believes are stored (appended and not rolled back)."""

    @abstractmethod
    def append(self, k: Tensor, v: Tensor) -> None:
        """Store ``k`` ``[n, kv_heads, key_dim]``, after RoPE, and ``v`` ``[n, kv_heads,
        value_dim]``. Any chunking of the same tokens gives the same state."""

    @abstractmethod
    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Causal attention of ``q`` ``[n, heads, key_dim]`` -> ``[n, heads, value_dim]``, in q's
        dtype."""

    @abstractmethod
    def rollback(self, n: int) -> None:
        """Forget the newest ``n`` tokens; a later append gives the state as if they never were."""

    @abstractmethod
    def materialize(self) -> tuple[Tensor, Tensor]:
        """The keys and values attended to, dense and token-major (for tests and adapters)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the distinct storages this layer owns."""

    def seal(self) -> None:  # noqa: B027 - most layers have nothing to do
        """Told once, when the prompt has been read; a compressing layer may compress now."""

    def runs(self, n: int) -> Iterator[Span]:
        """The next ``n`` tokens in runs, each asked for when the one before it has been taken in:
        to take a run at once is to take its tokens one by one."""
        yield 0, n

    def advance(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``append``, then ``attend``, run by run."""
        outs = []
        for a, b in self.runs(len(k)):
            self.append(k[a:b], v[a:b])
            outs.append(self.attend(q[a:b], scale))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def ready(self, n: int) -> bool:
        """Get ready for ``n`` new tokens; whether kernels can take them at once, at ``places``."""
        return False

    def places(self, first_row: int, rows: int) -> Sequence[Place | PackedLayer]:
        """Where kernels are to write so many new tokens, that stand in a batch from ``first_row``
        on: they count as held from now on. Asked when it is ``ready`` for so many."""
        raise NotImplementedError

    def settle(self) -> None:  # noqa: B027 - most layers have nothing to do
        """Told when tokens written at ``places`` have been attended to."""


@dataclass(slots=True)
class FlatBatch:
    """Which rows of a flat forward pass belong to which sequence's cache.

    ``spans[i]`` are the token rows of sequence ``i``; ``caches[i][layer]`` its layer caches.
    """

    spans: list[Span]
    caches: list[list[LayerCache]]

    def places(self) -> Places | None:
        """Where kernels are to write the rows, which count as held from now on; None if any cache
        is not ready for its own, or there are no sequences. ``settle`` comes next."""
        rows = [(a, b - a) for a, b in self.spans]
        for (_, n), caches in zip(rows, self.caches, strict=True):
            if not all(cache.ready(n) for cache in caches):
                return None
        if not rows:
            return None
        found = Places()
        for column in zip(*self.caches, strict=True):
            for cache, (first, n) in zip(column, rows, strict=True):
                found.add(cache.places(first, n))
            found.end_layer()
        return found

    def settle(self) -> None:
        """What was written at ``places`` has been attended to."""
        for caches in self.caches:
            for cache in caches:
                cache.settle()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append each sequence's rows to its own cache of ``layer``, then attend. Token-major.
        Those that are ready for kernels go in one call of each."""
        column = [caches[layer] for caches in self.caches]
        supported = ragged.supported(q, k.shape[1])
        ready = [supported and c.ready(b - a) for c, (a, b) in zip(column, self.spans, strict=True)]
        if not any(ready) and len(column) == 1:
            ((a, b),) = self.spans
            return column[0].advance(q[a:b], k[a:b], v[a:b], scale)
        out = q.new_empty((*q.shape[:2], v.shape[2]))
        places = Places()
        for cache, quick, (a, b) in zip(column, ready, self.spans, strict=True):
            if quick:
                places.add(cache.places(a, b - a))
            else:
                out[a:b] = cache.advance(q[a:b], k[a:b], v[a:b], scale)
        if places.dense:
            ragged.append_attend(places.dense, q, k, v, scale, out)
        if places.coded:
            packed.append_attend(places.coded, q, (k, v), scale, out)
        for cache, quick in zip(column, ready, strict=True):
            if quick:
                cache.settle()
        return out


class CachePolicy(Protocol):
    """Builds the layer caches of one sequence for a model. Made from a spec string."""

    @property
    def rehearses(self) -> bool:
        """Whether ``build``'s caches want their prompt read once more (``cache.rehearse``) before
        they are sealed."""

    @property
    def spec(self) -> str:
        """The spec string that makes this policy again."""

    def holding(self, tokens: int) -> CachePolicy:
        """This policy, or one like it whose caches can take back the newest ``tokens`` tokens."""

    def build(self, shape: ModelShape) -> list[LayerCache]:
        """One cache a layer, empty. Raises ConfigError if the model cannot take this policy."""

    def estimate(self, shape: ModelShape, tokens: int, prompt: int | None = None) -> int:
        """Upper bound on the bytes one sequence of ``tokens`` tokens will hold: while they are
        being read, or, sealed, when the first ``prompt`` of them were its prompt."""


# ------------------------------------------------------------------------------------- drafting


class Draft(NamedTuple):
    """Guessed tokens that may follow a sequence's newest one.

    ``probabilities`` float64 ``[k, vocab_size]`` are the distributions the tokens were drawn
    from, each given those before it; None says that they were not drawn but chosen. Of chosen ones
    ``chances`` may tell how sure the drafter is of each, given those before it: how many are
    verified may depend on them, since verifying fewer never changes what is written.
    """

    tokens: list[int]
    probabilities: Tensor | None = None
    chances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Sort:
    """Guesses that are as good as each other: what became of them is counted together. Until some
    have been tried, one is taken to be right, where those before it are, with chance
    ``expected``."""

    expected: float

    @classmethod
    def by_place(cls, first: float, later: float, most: int) -> tuple[Sort, ...]:
        """Those of ``most`` guesses of a draft that nothing but their place tells apart."""
        return cls(first), *(cls(later) for _ in range(most - 1))


class Offer(NamedTuple):
    """Guesses that could be made, at least one. ``kind`` names what makes them, whose cost is
    learnt by kind; ``sorts`` are those of each. ``tokens`` are those that have been made, as all
    are that cost nothing but to find that there are some. If it ``tells``, the draft will come with
    chances; ``chances`` are those of one that has been made, and stand for its sorts."""

    kind: str
    sorts: tuple[Sort, ...] = ()
    tells: bool = False
    chances: tuple[float, ...] = ()
    tokens: Sequence[int] = ()

    @property
    def k(self) -> int:
        """How many they are."""
        return len(self.chances or self.sorts)


class Asked(NamedTuple):
    """A sequence that wants at most ``k`` guesses behind ``tokens``, all that it has so far, of
    the offered ``kind``. Where those made are together less likely than ``worth``, more are not
    wanted."""

    number: int
    tokens: Sequence[int]
    k: int
    kind: str = ""
    worth: float = 0.0


class Reading(NamedTuple):
    """Tokens of a sequence that a step is about to read: those from ``start`` up to ``stop``, of
    the ``known`` ones it has so far. Guesses are not counted."""

    number: int
    start: int
    stop: int
    known: int


class Kept(NamedTuple):
    """Rows that are shown of a step, from ``first`` up to ``stop``, whose tokens stay in a
    sequence: the first of them is its token number ``start``. A sequence that lost its caches
    begins at 0 again."""

    number: int
    start: int
    first: int
    stop: int


class Drafter(ABC):
    """Guesses what sequences will say next. Sequences are known by a number.

    In every engine step ``offer``, and ``propose`` for what is not made yet, are asked first; the
    target reads the newest tokens and the guesses; once these have been verified, ``read`` is shown
    what the target made of all tokens that stay.
    """

    name: str
    """Its kinds of guesses begin with this."""
    most: int
    """Tokens a draft may have."""
    taps: tuple[int, ...] = ()
    """Hidden states of the target that ``read`` wants, as ``FlatModel.hidden_and_taps`` counts."""

    def estimate(self, tokens: int) -> int:
        """Upper bound on the bytes it holds for one sequence of that many tokens."""
        return 0

    def wants(self, work: Sequence[Reading]) -> list[int]:
        """Of each in ``work``, which a step is about to read, the first token that ``read`` is to
        be shown, and all behind it with it; its ``stop`` if none."""
        return [one.start if self.taps else one.stop for one in work]

    def read(self, taps: Tensor, kept: Sequence[Kept]) -> None:  # noqa: B027
        """See the hidden states ``[T, len(taps), hidden_size]`` of what it ``wants`` of a step,
        and which of these rows stay of every sequence that goes on. Called if it wants any."""

    @abstractmethod
    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """What could be guessed for each sequence, at no great cost: one of the offers, cut to
        what is worth verifying, is then asked for. An offer depends on the tokens so far only, and
        is of at most ``most`` guesses, whatever is asked."""

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """A draft for each sequence asked about; it may be shorter than asked, or empty. Never
        asked of a drafter whose offers have their tokens."""
        raise NotImplementedError

    def forget(self, number: int) -> None:  # noqa: B027 - most drafters have nothing to forget
        """Sequence ``number`` has ended."""


# ---------------------------------------------------------------------------------- compression


@dataclass(frozen=True, slots=True)
class CompressedPrompt:
    """A shortened text: kept spans of the original, in order, and nothing else.

    ``kept`` are half-open character spans of the original whose concatenation is ``text``;
    ``tokens`` and ``original_tokens`` count with the compressor's tokenizer (fields named
    ``target_*`` with the target's, when one was given). ``report`` holds numbers only a curious
    user wants: stages, timings in seconds, warnings, diagnostics, a settings fingerprint.
    """

    text: str
    tokens: int
    original_tokens: int
    kept: tuple[Span, ...]
    requested_tokens: int
    method: str
    kept_token_indices: tuple[int, ...] = ()
    target_tokens: int | None = None
    scores: tuple[float, ...] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Share of the original tokens that were kept (1.0 for an empty text)."""
        return self.tokens / self.original_tokens if self.original_tokens else 1.0

    def to_json(self) -> str:
        """One JSON object with a key a field; ``from_json`` makes an equal record of it."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, data: str) -> CompressedPrompt:
        """The record ``to_json`` wrote. Raises InputError if it is not one."""
        try:
            values = json.loads(data)
            values["kept"] = tuple((a, b) for a, b in values["kept"])
            values["kept_token_indices"] = tuple(values["kept_token_indices"])
            if values["scores"] is not None:
                values["scores"] = tuple(values["scores"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a compressed prompt in JSON: {error}") from None


class Compressor(Protocol):
    """Shortens a text to a token budget. Give exactly one of the two budgets."""

    def compress(
        self,
        text: str,
        *,
        target_tokens: int | None = None,
        keep_ratio: float | None = None,
        question: str | None = None,
    ) -> CompressedPrompt:
        """Raises ConfigError for a bad budget, BudgetError if protected text exceeds it.
        ``question`` is used only by question-aware methods."""


# ----------------------------------------------------------------------------------- generation


@dataclass(slots=True)
class RequestMetrics:
    """Seconds and counts of one finished request; ``cache_bytes`` is the peak held, and
    ``sealed_bytes`` what was held once the prompt had been read and compressed. ``steps`` gave it
    tokens; ``drafted_tokens`` were guessed for it, ``accepted_tokens`` of them were right."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cache_bytes: int = 0
    sealed_bytes: int = 0
    preemptions: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed; the first token belongs to prefill."""
        decoded = self.generated_tokens - 1
        return decoded / self.decode_s if decoded > 0 and self.decode_s > 0 else 0.0


@dataclass(slots=True)
class Completion:
    """What a request produced. ``finish_reason`` is ``"stop"``, ``"length"`` or ``"cancelled"``.
    ``logprobs``, if asked for, has one ``{token_id: log-probability}`` a token, the sampled
    token always among them."""

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: RequestMetrics
    logprobs: list[dict[int, float]] | None = None


# -------------------------------------------------------------------------------------- documents


@dataclass(frozen=True, slots=True)
class Document:
    """A source read to text. ``name`` is what the user called it (a path, or ``"-"``)."""

    name: str
    text: str

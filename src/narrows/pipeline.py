"""The main job: answer a question from documents and recordings of any length.

listen, read -> choose passages -> compress -> prefill -> answer, each stage timed, each optional:
text that fits the budget goes to the model unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from narrows.cache.dense import DensePolicy
from narrows.cache.saved import SavedCache
from narrows.compression import METHODS, make_compressor
from narrows.config import SamplingParams
from narrows.contracts import Completion, Document, Span
from narrows.errors import BudgetError, ConfigError, InputError
from narrows.listen import passages
from narrows.retrieve.documents import read_documents
from narrows.retrieve.passages import Passage, split_passages
from narrows.retrieve.rank import RANKERS, Ranker

if TYPE_CHECKING:
    from narrows.llm import LLM

PASSAGE_TOKENS = 192
"""Size of the passages that are ranked: a few paragraphs."""

HEADROOM = 3
"""With a compressor behind the ranker, passages of this many times the budget reach it."""

SPLICE_SHARE = 16
"""A compressed text encodes to a few more tokens than were kept, where it was spliced; one part
in this many of the window is left for them."""

SEPARATOR = "\n\n"
ASK = f"{SEPARATOR}Answer the question from the text above, in one or two sentences."

RESERVED = 512
"""Tokens of the window that documents read once leave for questions and answers."""


@dataclass(frozen=True, slots=True)
class Source:
    """A stretch of a document the answer was given to read; ``span`` in characters of the
    document, ``score`` from the ranker, or from the search in a recording (None where nothing was
    ranked)."""

    document: str
    span: Span
    score: float | None = None


@dataclass(slots=True)
class Savings:
    """What narrowing the input saved. ``cache_bytes`` is the most that was held,
    ``sealed_cache_bytes`` what was once the prompt had been read, ``full_cache_bytes`` what the
    same cache policy would hold for the whole input, had the model been able to take it. The
    answer took ``steps`` of the model, for which ``drafted_tokens`` were guessed and
    ``accepted_tokens`` of them were right."""

    document_tokens: int = 0
    kept_tokens: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cache_bytes: int = 0
    sealed_cache_bytes: int = 0
    full_cache_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(slots=True)
class Answer:
    """``text``, the ``sources`` it was given in document order, and the ``savings``."""

    text: str
    sources: list[Source]
    savings: Savings
    completion: Completion

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "text": self.text,
            "finish_reason": self.completion.finish_reason,
            "sources": [asdict(s) for s in self.sources],
            "savings": asdict(self.savings),
        }


def ask(
    llm: LLM,
    question: str,
    docs: Sequence[str] = (),
    *,
    documents: Sequence[Document] = (),
    audio: Sequence[str] = (),
    budget: int | None = None,
    method: str = "rank",
    ranker: str = "bm25",
    params: SamplingParams | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer ``question`` from ``docs`` (paths, ``"-"`` for standard input), ``documents`` and
    ``audio``.

    Args:
        llm: the loaded model.
        question: what to answer.
        docs: files to read: text, Markdown, HTML or PDF.
        documents: texts already read.
        audio: recordings. What is said there about the question is read like documents whose
            names are the recording's and the time, such as ``"talk.mp3 12:31-12:58"``.
        budget: most tokens of document text the model is given; None for what its window takes.
        method: how a text beyond the budget is cut down: ``"rank"`` (best passages),
            a compression method over everything (``"dac"``), both (``"rank+dac"``), or ``"none"``.
        ranker: ``"bm25"`` or ``"minilm"``.
        params: sampling; greedy, 128 tokens by default.
        on_text: called with each piece of the answer as it becomes final.

    Raises InputError, ConfigError or BudgetError, each saying what to do.
    """
    ranked, compressor = _parse_method(method)
    if not question.strip():
        raise InputError("the question is empty; say what to answer")
    if budget is not None and budget < 1:
        raise ConfigError(f"budget must be at least 1 token (given: {budget})")
    params = params or SamplingParams(max_tokens=128)
    savings = Savings()
    clock = _Clock(savings.seconds)
    heard: dict[str, float] = {}
    if audio:
        with clock("listen"):
            said = passages(question, audio)
        if not (said or docs or documents):
            raise InputError(f"no speech found in {', '.join(audio)}")
        heard = {document.name: score for document, score in said}
        documents = [*documents, *(document for document, _ in said)]
    with clock("read"):
        texts = _texts(docs, documents)
        pieces = [Passage(d.name, (0, len(d.text)), d.text) for d in texts]
        savings.document_tokens = sum(_count(llm, p.text) for p in pieces)
    room = _room(llm, question, params)
    if compressor is not None:
        room -= room // SPLICE_SHARE
    limit = room if budget is None else min(budget, room)
    scores = [heard.get(p.document) for p in pieces]
    fits = savings.document_tokens + 2 * len(pieces) <= limit
    if not fits and not ranked and compressor is None:
        raise InputError(
            f"the documents have {savings.document_tokens} tokens but {limit} fit; choose a "
            "method other than none"
        )
    if not fits and ranked:
        with clock("rank"):
            target = limit if compressor is None else HEADROOM * limit
            pieces, scores = _best(llm, texts, question, RANKERS.get(ranker)(), target)
    context = SEPARATOR.join(p.text.strip() for p in pieces)
    if not fits and compressor is not None:
        with clock("compress"):
            made = make_compressor(compressor, llm.model)
            context = made.compress(context, target_tokens=limit, question=question).text
    ids = _prompt(llm, context, question)
    if len(ids) + params.max_tokens > llm.model.shape.max_tokens:
        raise BudgetError(
            f"the prompt has {len(ids)} tokens and the answer may take {params.max_tokens}, but "
            f"the model takes {llm.model.shape.max_tokens}; lower the budget or max_tokens"
        )
    done = _write(llm, ids, params, on_text, savings)
    savings.kept_tokens = _count(llm, context)
    whole = savings.document_tokens + len(ids) - savings.kept_tokens + savings.answer_tokens
    savings.full_cache_bytes = llm.engine.policy.estimate(
        llm.model.shape, whole, whole - savings.answer_tokens
    )
    sources = [Source(p.document, p.span, s) for p, s in zip(pieces, scores, strict=True)]
    return Answer(done.text.strip(), sources, savings, done)


def read(
    llm: LLM, docs: Sequence[str] = (), *, documents: Sequence[Document] = (), method: str = "none"
) -> SavedCache:
    """Read documents once, for ``ask_saved`` to ask about; see ``ask`` for ``docs`` and
    ``documents``. ``method`` is a compression method for what is too long, or ``"none"``.

    Raises InputError, ConfigError or BudgetError, each saying what to do.
    """
    context = SEPARATOR.join(d.text.strip() for d in _texts(docs, documents)).strip()
    if not context:
        raise InputError("the documents hold no text")
    limit = llm.model.shape.max_tokens - RESERVED
    if (count := _count(llm, context)) > limit:
        if method == "none":
            raise InputError(
                f"the documents have {count} tokens but {limit} fit; give a compression method, "
                "such as dac-sweep"
            )
        room = limit - limit // SPLICE_SHARE
        context = make_compressor(method, llm.model).compress(context, target_tokens=room).text
    text = _prompt_text(llm, context, "")
    head = text[: text.rindex(ASK)]
    return llm.read(_plain_ids(llm, head, start=True))


def ask_saved(
    llm: LLM,
    saved: SavedCache,
    question: str,
    *,
    params: SamplingParams | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer ``question`` from documents that ``read`` has read; see ``ask``. ``sources`` are
    not known any more. Raises InputError, ConfigError or RequestRejected."""
    if not question.strip():
        raise InputError("the question is empty; say what to answer")
    # Behind some text, since templates may strip what a message begins with.
    text = _prompt_text(llm, "-", question)
    ids = _plain_ids(llm, text[text.index(ASK) :], start=False)
    savings = Savings(document_tokens=len(saved.tokens))
    done = _write(llm, ids, params or SamplingParams(max_tokens=128), on_text, savings, saved)
    savings.kept_tokens = len(saved.tokens)
    whole = savings.prompt_tokens + savings.answer_tokens
    savings.full_cache_bytes = DensePolicy().estimate(llm.model.shape, whole)
    return Answer(done.text.strip(), [], savings, done)


def _write(
    llm: LLM,
    ids: list[int],
    params: SamplingParams,
    on_text: Callable[[str], None] | None,
    savings: Savings,
    saved: SavedCache | None = None,
) -> Completion:
    """Let the model answer, and note what it took."""
    request = llm.submit(ids, params, saved)
    for text in llm.follow(request):
        if on_text is not None:
            on_text(text)
    done = request.completion()
    savings.prompt_tokens = done.metrics.prompt_tokens
    savings.answer_tokens = done.metrics.generated_tokens
    savings.cache_bytes = done.metrics.cache_bytes
    savings.sealed_cache_bytes = done.metrics.sealed_bytes
    savings.seconds["prefill"] = done.metrics.prefill_s
    savings.seconds["decode"] = done.metrics.decode_s
    savings.tokens_per_second = done.metrics.tokens_per_second
    savings.steps = done.metrics.steps
    savings.drafted_tokens = done.metrics.drafted_tokens
    savings.accepted_tokens = done.metrics.accepted_tokens
    return done


def _texts(docs: Sequence[str], documents: Sequence[Document]) -> list[Document]:
    texts = [*documents, *read_documents(docs)]
    if not texts:
        raise InputError("no document given; name at least one file, or - for standard input")
    return texts


class _Clock:
    """Adds the seconds a ``with clock(stage)`` block took to a table."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def _parse_method(method: str) -> tuple[bool, str | None]:
    """Whether passages are ranked, and the compression method after it."""
    if method == "none":
        return False, None
    first, _, rest = method.partition("+")
    ranked = first == "rank"
    compressor = rest or None if ranked else method
    if compressor is not None and compressor not in METHODS:
        METHODS.get(compressor)  # raises, naming the choices
    return ranked, compressor


def _count(llm: LLM, text: str) -> int:
    return len(llm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _room(llm: LLM, question: str, params: SamplingParams) -> int:
    """Tokens of document text that fit beside the question, the template and the answer."""
    window = llm.model.shape.max_tokens
    room = window - params.max_tokens - len(_prompt(llm, "", question))
    if room < 1:
        raise BudgetError(
            f"question and answer leave no room for text in the model's {window} tokens; shorten "
            "the question or lower max_tokens"
        )
    return room


def _best(
    llm: LLM, texts: Sequence[Document], question: str, ranker: Ranker, target: int
) -> tuple[list[Passage], list[float | None]]:
    """The passages that answer best, up to ``target`` tokens, in document order."""
    size = min(PASSAGE_TOKENS, target)
    passages = [p for d in texts for p in split_passages(d, size, lambda t: _count(llm, t))]
    passages = [p for p in passages if p.text.strip()]
    scores = ranker.score(question, [p.text for p in passages])
    gap = _count(llm, SEPARATOR)
    used = 0
    chosen: list[int] = []
    for i in sorted(range(len(passages)), key=lambda i: (-scores[i], i)):
        cost = _count(llm, passages[i].text) + gap
        if used + cost <= target or not chosen:
            used += cost
            chosen.append(i)
    chosen.sort()
    return [passages[i] for i in chosen], [float(scores[i]) for i in chosen]


def _prompt(llm: LLM, context: str, question: str) -> list[int]:
    """Token ids of the whole prompt."""
    return _plain_ids(llm, _prompt_text(llm, context, question), start=True)


def _prompt_text(llm: LLM, context: str, question: str) -> str:
    """The whole prompt; a model without a chat template gets plain text."""
    body = f"{context}{ASK}\nQuestion: {question.strip()}"
    if llm.tokenizer.chat_template is None:
        return f"{body}\nAnswer:"
    return llm.chat_text([{"role": "user", "content": body}])


def _plain_ids(llm: LLM, text: str, *, start: bool) -> list[int]:
    """Token ids of a piece of a prompt. A chat template writes its own special tokens; other
    prompts have the tokenizer's, at their ``start``."""
    if start and llm.tokenizer.chat_template is None:
        return llm.encode(text)
    ids: list[int] = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids

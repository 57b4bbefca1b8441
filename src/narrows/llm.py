"""The front door: load a model once, then generate, stream, chat or ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.cache.saved import SavedCache, load_cache
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import Completion
from narrows.draft.specs import make_drafter
from narrows.engine.engine import Engine, Step
from narrows.engine.sequence import Sequence as Request
from narrows.engine.sequence import State
from narrows.errors import ConfigError, InputError
from narrows.model.flat import FlatModel

if TYPE_CHECKING:
    from narrows.pipeline import Answer

Prompt = str | Sequence[int]
Messages = Sequence[dict[str, str]]


class LLM:
    """A model with its engine.

    Args:
        model: a known name (``narrows models``), a hub id, a folder or a GGUF file.
        cache: cache spec, such as ``"dense"``.
        draft: drafter spec, such as ``"lookup"``, or the folder of a trained one; ``"none"``;
            ``"auto"`` takes the best there is.
            A drafter changes the speed and nothing else.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        device: ``"cpu"``, ``"cuda"``, ...; None takes CUDA where there is one.
        limits: fields of EngineConfig.

    Raises ModelError, UnsupportedModel or ConfigError.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        cache: str = "dense",
        draft: str = "auto",
        dtype: str = "bfloat16",
        device: str | None = None,
        **limits: Any,
    ) -> None:
        policy = parse_cache(cache)
        config = EngineConfig(**limits)
        self.model = FlatModel.load(model, dtype=dtype, device=device)
        self.engine = Engine(self.model, policy, config, make_drafter(draft, self.model))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (transformers' fast one)."""
        return self.model.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        on_step: Callable[[Step], None] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or many, in one continuous batch.

        A prompt is text (tokenised as it is, no chat template) or token ids. ``on_step`` is
        called after each engine step. Raises RequestRejected before any work if a prompt can
        never run, NumericalError if the model gives NaN.
        """
        requests: list[Request] = []
        try:
            for prompt in _as_list(prompts):
                requests.append(self.submit(prompt, params))
            for _ in self.engine.run(on_step):
                pass
        finally:
            self._drop(requests)
        return [r.completion() for r in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The completion of one prompt in pieces of final text; closing the iterator cancels
        the request."""
        yield from self.follow(self.submit(prompt, params))

    def follow(self, request: Request) -> Iterator[str]:
        """Step the engine until ``request`` ends, giving its text in pieces; also those of steps
        that others took."""
        try:
            while True:
                while request.news:
                    yield request.news.pop(0)
                if request.state is State.FINISHED:
                    return
                self.engine.step()
        finally:
            self._drop([request])

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Completion:
        """Answer a conversation of ``{"role", "content"}`` messages."""
        return self.generate([self.chat_ids(messages)], params)[0]

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None
    ) -> Iterator[str]:
        """``chat`` in pieces of final text."""
        return self.stream(self.chat_ids(messages), params)

    def ask(self, question: str, docs: Sequence[str] = (), **options: Any) -> Answer:
        """Answer ``question`` from documents of any length; see ``narrows.pipeline.ask``."""
        from narrows.pipeline import ask

        return ask(self, question, docs, **options)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens the tokenizer adds by itself."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def chat_ids(self, messages: Messages) -> list[int]:
        """Token ids of ``chat_text``."""
        text = self.chat_text(messages)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def chat_text(self, messages: Messages) -> str:
        """A conversation in the model's chat template, ready for the answer."""
        if not messages:
            raise InputError("a conversation needs at least one message")
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                f"model {self.model.name!r} has no chat template; use generate with plain text"
            )
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return text

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        saved: SavedCache | None = None,
    ) -> Request:
        """Queue a request without running it; see ``follow``. Its prompt goes on where ``saved``
        ends, if given."""
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self.engine.submit(ids, params or SamplingParams(), saved)

    def read(self, prompt: Prompt) -> SavedCache:
        """Read a prompt for requests to go on from. See ``save_cache`` and ``load_cache``."""
        return self.engine.read(self.encode(prompt) if isinstance(prompt, str) else list(prompt))

    def load_cache(self, path: str | Path) -> SavedCache:
        """A cache that ``narrows.cache.saved.save_cache`` wrote, on this model's device. Raises
        InputError for a file that is not one, ConfigError for one of another model, or that this
        model's cache policy or drafter cannot go on from."""
        saved = load_cache(Path(path), self.model.rotary, self.model.shape.device)
        self.engine.check_saved(saved)
        return saved

    def _drop(self, requests: list[Request]) -> None:
        for request in requests:
            self.engine.cancel(request)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(x, int) for x in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]

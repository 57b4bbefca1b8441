"""What a model answers from the clips that a search found."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from narrows.bench.listen_find import Hearing
from narrows.bench.metrics import best, bootstrap
from narrows.bench.progress import Progress
from narrows.bench.report import Row, row
from narrows.contracts import Document
from narrows.listen import PASSAGES
from narrows.llm import LLM
from narrows.pipeline import ask
from narrows.retrieve.audio import Wave
from narrows.retrieve.transcribe import Transcriber

SCORES = ("exact_match", "token_f1", "inclusion")


def answer_rows(
    hearings: Sequence[Hearing], model: str, count: int, *, seed: int, show_progress: bool
) -> list[Row]:
    """Rows of the scores of a model's answers to the first ``count`` questions that have right
    answers, each given the best clips that a backend's usual search finds. As ``narrows ask
    --audio`` does, clips are transcribed first where a backend's text is not fit to be read."""
    llm = LLM(model)
    clips = hearings[0].clips
    right = {question: answers for clip in clips for question, answers in clip.questions if answers}
    chosen = list(right)[:count]
    written = _Written([clip.wave for clip in clips])
    rows = []
    with Progress("answers", visible=show_progress) as progress:
        progress.expect(len(hearings) * len(chosen))
        for hearing in hearings:
            said = []
            for question in chosen:
                places = sorted(hearing.best(question, PASSAGES))
                texts = [hearing.heard[i].text if hearing.verbatim else written[i] for i in places]
                documents = [
                    Document(f"clip {i}", text) for i, text in zip(places, texts, strict=True)
                ]
                said.append(ask(llm, question, documents=documents).text if documents else "")
                progress.advance()
            for metric in SCORES:
                values = [best(metric, a, right[q]) for a, q in zip(said, chosen, strict=True)]
                rows.append(
                    row(
                        "listen",
                        method=hearing.name,
                        model=model,
                        metric=metric,
                        unit="share",
                        value=fmean(values),
                        interval=bootstrap(values, seed=seed),
                        n=len(values),
                        part="answers",
                        size=len(clips),
                    )
                )
    return rows


class _Written(dict[int, str]):
    """What the default recogniser writes of the clips, each when it is first asked for."""

    def __init__(self, waves: Sequence[Wave]) -> None:
        super().__init__()
        self._waves = waves
        self._transcriber = Transcriber.load()

    def __missing__(self, place: int) -> str:
        (transcript,) = self._transcriber([self._waves[place]])
        self[place] = transcript.text
        return self[place]

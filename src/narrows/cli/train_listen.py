"""Commands that train what finds the clips of a recording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrows.cli.options import Data, Device, check_places, write

if TYPE_CHECKING:
    from narrows.bench.progress import Progress
    from narrows.retrieve.speech_encoder import SpeechEncoder
    from narrows.train.speech import SpeechSet

Clips = Annotated[
    int, typer.Option(help="Stretches of the data folder's texts spoken to learn from.")
]
SpeechName = Annotated[
    str | None,
    typer.Option(
        help="Known name or folder: a CTranslate2 Whisper, or a Whisper or wav2vec2-style model of "
        "transformers. Default: whisper-base."
    ),
]
TextName = Annotated[
    str | None,
    typer.Option(
        help="Known name, hub id or folder of a BERT sentence encoder. Default: all-minilm-l6-v2."
    ),
]
Held = Annotated[
    int, typer.Option(help="Stretches with a question, of other articles, spoken to measure.")
]


def clsr(
    out: Annotated[Path, typer.Option(help="Folder for the recogniser; a run there goes on.")],
    data: Data = None,
    clips: Clips = 6000,
    held: Held = 256,
    letter_steps: Annotated[
        int, typer.Option(help="Extension: updates for letters before all else; 0 for none.")
    ] = 800,
    letter_rate: Annotated[float, typer.Option(help="Their highest learning rate.")] = 3e-3,
    steps: Annotated[int, typer.Option(help="Updates for recognition.")] = 4000,
    joint_steps: Annotated[
        int, typer.Option(help="Updates with the contrastive loss after that; 0 for none.")
    ] = 500,
    batch: Annotated[int, typer.Option(help="Clips of an update.")] = 32,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    joint_rate: Annotated[float, typer.Option(help="That of the updates after it.")] = 1e-4,
    sampling: Annotated[
        float, typer.Option(help="Share of the first pass's errors told before the second.")
    ] = 0.75,
    adaptor: Annotated[
        str, typer.Option(help="quantised, or soft, the ablation without a choice of pieces.")
    ] = "quantised",
    temperature: Annotated[float, typer.Option(help="Of the contrastive loss.")] = 0.02,
    negatives: Annotated[
        str, typer.Option(help="batch, or all: an extension, every training question.")
    ] = "all",
    blocks: Annotated[int, typer.Option(help="Of the decoder.")] = 3,
    near: Annotated[
        int, typer.Option(help="Extension: convolutions over states before frames are made.")
    ] = 2,
    spelling: Annotated[
        bool, typer.Option(help="Extension: write pieces by how they are spelt, too.")
    ] = True,
    speech_encoder: SpeechName = None,
    text_encoder: TextName = None,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of weights, voices and order.")] = 0,
) -> None:
    """A recogniser that reads speech into the vocabulary of a text encoder, for `narrows listen`.
    It learns from synthetic voices, which need flite and espeak-ng; what they say and what the
    speech encoder makes of it is kept in the folder."""
    from narrows.bench.progress import Progress
    from narrows.errors import ConfigError
    from narrows.retrieve.clsr import GUESSES, ClsrConfig
    from narrows.retrieve.rank import ENCODER, Embedder
    from narrows.retrieve.speech_encoder import SpeechEncoder
    from narrows.retrieve.transcribe import RECOGNISER
    from narrows.train import clsr
    from narrows.train.hearing import draw
    from narrows.train.loop import LoopOptions, processes

    letters = None
    if letter_steps and not near:
        raise ConfigError("letters are learnt by convolutions: give --near 1, or --letter-steps 0")
    shape: dict[str, Any] = {"blocks": blocks, "near": near, "spelling": spelling}
    ClsrConfig(vocab_size=GUESSES, vocabulary="", **shape)  # refused before anything is spoken
    if letter_steps:
        letters = LoopOptions(steps=letter_steps, rate=letter_rate, save_every=save_every)
    goal = clsr.Goal(sampling=sampling)
    stages = [("recognition", goal, LoopOptions(steps=steps, rate=rate, save_every=save_every))]
    if joint_steps:
        told: dict[str, Any] = {
            "adaptor": adaptor,
            "temperature": temperature,
            "negatives": negatives,
        }
        joint = clsr.Goal(contrast=1 / 3, sampling=sampling, **told)
        options = LoopOptions(steps=joint_steps, rate=joint_rate, save_every=save_every)
        stages.append(("joint", joint, options))
    check_places(out, folders=True)
    crew = processes(device)
    first = crew.is_main_process
    with Progress("speech, then updates", visible=first) as progress:
        progress.expect(letter_steps + steps + joint_steps)
        with crew.main_process_first():
            encoder = SpeechEncoder.load(_named(speech_encoder) or RECOGNISER, device=device)
            spoken, kept = _speech(out, encoder, data, clips, held, seed, progress)
        text = _named(text_encoder) or ENCODER
        history = clsr.run(
            Embedder.load(text, device=device),
            spoken,
            kept,
            out,
            stages,
            letters=letters,
            batch=batch,
            seed=seed,
            on_step=lambda step, told: progress.advance(),
            state_seconds=encoder.state_seconds,
            **_between(encoder, text),
            **shape,
        )
    if not first:
        return
    draw(history, out / "curves.png")
    last = history[-1]
    found = last["found_soft" if adaptor == "soft" else "found"]
    write(
        f"{out}: on held-out articles and voices {last['word_error']:.1%} of words wrong, "
        f"{found:.1%} of questions find their clip among {len(kept)}\n"
    )


def dual(
    out: Annotated[Path, typer.Option(help="Folder for the dual encoder; a run there goes on.")],
    speech: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run, such as train clsr's, to learn from the same speech by the same "
            "--clips, --held and --seed; default: OUT."
        ),
    ] = None,
    data: Data = None,
    clips: Clips = 6000,
    held: Held = 256,
    steps: Annotated[int, typer.Option(help="Updates.")] = 3000,
    batch: Annotated[int, typer.Option(help="Clips of an update.")] = 32,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    captions: Annotated[
        bool, typer.Option(help="Pair every clip with its own words too, not only its question.")
    ] = True,
    temperature: Annotated[float, typer.Option(help="Of the contrastive loss.")] = 0.05,
    negatives: Annotated[
        str, typer.Option(help="Texts clips are told from: the batch's, or all of training.")
    ] = "all",
    blocks: Annotated[int, typer.Option(help="Of the transformer.")] = 3,
    speech_encoder: SpeechName = None,
    text_encoder: TextName = None,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of weights, voices and order.")] = 0,
) -> None:
    """A dual encoder, which makes vectors of speech without words, for `narrows listen`: what CLSR
    is to be compared with. It learns from synthetic voices, as `narrows train clsr` does."""
    from narrows.bench.progress import Progress
    from narrows.errors import ConfigError
    from narrows.retrieve.rank import ENCODER, Embedder
    from narrows.retrieve.speech_encoder import SpeechEncoder
    from narrows.retrieve.transcribe import RECOGNISER
    from narrows.train.dual import DualGoal, run
    from narrows.train.hearing import draw
    from narrows.train.loop import LoopOptions, processes

    goal = DualGoal(captions=captions, temperature=temperature, negatives=negatives)  # type: ignore[arg-type]
    options = LoopOptions(steps=steps, rate=rate, save_every=save_every)
    check_places(out, folders=True)
    if speech is not None and not (speech / "work").is_dir():
        raise ConfigError(f"{speech} holds no speech: give the folder of a run that made some")
    crew = processes(device)
    first = crew.is_main_process
    with Progress("speech, then updates", visible=first) as progress:
        progress.expect(steps)
        with crew.main_process_first():
            encoder = SpeechEncoder.load(_named(speech_encoder) or RECOGNISER, device=device)
            spoken, kept = _speech(speech or out, encoder, data, clips, held, seed, progress)
        text = _named(text_encoder) or ENCODER
        history = run(
            Embedder.load(text, device=device),
            spoken,
            kept,
            out,
            goal,
            options,
            batch=batch,
            seed=seed,
            on_step=lambda step, told: progress.advance(),
            blocks=blocks,
            **_between(encoder, text),
        )
    if not first:
        return
    draw(history, out / "curves.png")
    write(
        f"{out}: on held-out articles and voices {history[-1]['found']:.1%} of questions find "
        f"their clip among {len(kept)}\n"
    )


def _named(encoder: str | None) -> str | None:
    """The name that a checkpoint keeps: of a folder, its whole path."""
    return str(Path(encoder).resolve()) if encoder and Path(encoder).is_dir() else encoder


def _between(speech: SpeechEncoder, text: str) -> dict[str, Any]:
    """What a head's config says of its encoders."""
    return {
        "speech_encoder": speech.name,
        "state_size": speech.state_size,
        "text_encoder": text,
    }


def _speech(
    run: Path,
    encoder: SpeechEncoder,
    data: Path | None,
    clips: int,
    held: int,
    seed: int,
    progress: Progress,
) -> tuple[SpeechSet, SpeechSet]:
    """Clips to learn from and clips to measure on, spoken into the folder of a run as far as they
    are not there."""
    from narrows.data import locate
    from narrows.train.speech import speak_all
    from narrows.train.spoken_text import stretches

    texts = stretches(locate(data), seed)
    learnt = [one for one in texts if not one.held][:clips]
    measured = [one for one in texts if one.held and one.question][:held]
    progress.expect(len(learnt) + len(measured))
    spoken, kept = (
        speak_all(some, encoder, run / "work" / name, seed=seed, on_done=progress.advance)
        for name, some in (("train", learnt), ("held", measured))
    )
    return spoken, kept

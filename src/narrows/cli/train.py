"""Commands that train."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrows.cli.options import (
    DEFAULT_MODEL,
    Data,
    Device,
    Dtype,
    Text,
    check_places,
    stderr,
    write,
)

if TYPE_CHECKING:
    from narrows.bench.progress import Progress
    from narrows.retrieve.speech_encoder import SpeechEncoder
    from narrows.train.speech import SpeechSet

app = typer.Typer(help="Train small parts for a model.", no_args_is_help=True)

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


@app.command("specformer")
def specformer(
    out: Annotated[Path, typer.Option(help="Folder for the drafter; a run there goes on.")],
    target: Annotated[
        str, typer.Option(help="Known name, hub id, folder or GGUF.")
    ] = DEFAULT_MODEL,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON Lines of prompts; default: the data folder's.")
    ] = None,
    given: Annotated[
        bool, typer.Option("--given", help="Learn from the answers in --prompts, as a control.")
    ] = False,
    data: Data = None,
    count: Annotated[int, typer.Option(help="Prompts taken from the data folder.")] = 2000,
    long_count: Annotated[
        int, typer.Option(help="Extension: as many long prompts from the data folder besides.")
    ] = 0,
    long_tokens: Annotated[int, typer.Option(help="Tokens of a long prompt, about.")] = 2000,
    steps: Annotated[int, typer.Option(help="Updates.")] = 500,
    slots: Annotated[int, typer.Option(help="Tokens forecast at once.")] = 4,
    taps: Annotated[
        list[int] | None,
        typer.Option(help="Hidden states read. Repeatable; default 0, half, the last two."),
    ] = None,
    positional: Annotated[
        bool, typer.Option(help="A layer of its own for each slot; without it, a bias.")
    ] = True,
    draft_attention: Annotated[
        str, typer.Option(help="Among the slots: bidirectional or causal.")
    ] = "bidirectional",
    anchor: Annotated[bool, typer.Option(help="Extension: slots see the newest token.")] = False,
    markov: Annotated[
        int, typer.Option(help="Extension: rank of what a token adds to its followers' scores.")
    ] = 0,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Extension: guess from so many common tokens only.")
    ] = None,
    distill: Annotated[
        float, typer.Option(help="Extension: share of the loss against the target's own scores.")
    ] = 0.0,
    linear_start: Annotated[
        bool, typer.Option(help="Extension: begin as the best linear forecast.")
    ] = False,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 6e-4,
    answer_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of an update, about.")] = 4096,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 50,
    start: Annotated[
        Path | None, typer.Option("--from", help="Go on from this trained drafter.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of prompts, weights and order.")] = 0,
) -> None:
    """A SpecFormer drafter for a model, taught by the model's own answers. Runs in several
    processes if started by `accelerate launch`."""
    from narrows.bench.progress import Progress
    from narrows.data import locate
    from narrows.draft.specformer import SpecFormer
    from narrows.draft.specformer_drafter import check_target
    from narrows.errors import ConfigError
    from narrows.llm import LLM
    from narrows.train import specformer
    from narrows.train.loop import LoopOptions, processes
    from narrows.train.prompts import (
        CHARACTERS,
        answers_from_file,
        from_data,
        from_file,
        long_from_data,
    )

    if given and (prompts is None or long_count):
        raise ConfigError("--given needs --prompts, and no --long-count: answers come from there")
    options = LoopOptions(steps=steps, rate=rate, save_every=save_every)
    check_places(out, folders=True)
    texts = from_file(prompts) if prompts else from_data(locate(data), count, seed)
    longest = 1024
    if long_count:
        texts += long_from_data(locate(data), long_count, CHARACTERS * long_tokens, seed)
        random.Random(seed).shuffle(texts)  # those held out are the last
        longest = max(longest, 2 * long_tokens)
    first = processes(device).is_main_process
    llm = LLM(target, draft="none", dtype=dtype, device=device)
    module = None
    if start is not None:
        module = SpecFormer.load(start)
        check_target(module.config, llm.model)
    with Progress("answers, then updates", visible=first) as progress:
        progress.expect(len(texts) + steps)
        history = specformer.run(
            llm,
            texts,
            out,
            options,
            module=module,
            given=answers_from_file(prompts) if given and prompts else None,
            distill=distill,
            linear_start=linear_start,
            max_tokens=answer_tokens,
            longest=longest,
            batch_tokens=batch_tokens,
            seed=seed,
            on_answers=progress.advance,
            on_step=lambda step, told: progress.advance(),
            slots=slots,
            positional=positional,
            draft_attention=draft_attention,
            anchor=anchor,
            markov=markov,
            draft_vocab=draft_vocab,
            **({"taps": tuple(taps)} if taps else {}),
        )
    if not first:
        return
    specformer.draw(history, out / "curves.png")
    last = history[-1]
    write(f"{out}: {last['kappa']:.2f} tokens a step on held-out answers, teacher-forced\n")


@app.command("kv-latent")
def kv_latent(
    converted: Annotated[Path, typer.Argument(help="Folder that narrows convert kv-latent wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the healed model.")],
    text: Text = "own",
    data: Data = None,
    teacher: Annotated[
        str | None, typer.Option(help="The base model; default: what it was converted from.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of text to learn from, about.")] = 500_000,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows of an update.")] = 4,
    layer_steps: Annotated[int, typer.Option(help="Updates layer by layer; 0: none.")] = 100,
    layer_rate: Annotated[float, typer.Option(help="Their highest learning rate.")] = 5e-4,
    steps: Annotated[int, typer.Option(help="Updates of the whole; 0: none.")] = 200,
    rate: Annotated[float, typer.Option(help="Their highest learning rate.")] = 3e-4,
    loss: Annotated[str, typer.Option(help="Of the whole: kl from the base, or text.")] = "kl",
    rank: Annotated[int, typer.Option(help="Of LoRA on the MLPs; 0: none. The paper's: 256.")] = 0,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 25,
    work: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints; default: OUT.work. A run goes on.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of text, order and LoRA.")] = 0,
) -> None:
    """Heal a converted model: each layer after the base's, then the whole. Runs in several
    processes if started by `accelerate launch`."""
    from narrows.bench.progress import Progress
    from narrows.errors import ConfigError
    from narrows.latent import checkpoint
    from narrows.llm import LLM
    from narrows.train import latent, texts
    from narrows.train.loop import LoopOptions, processes

    if loss not in ("kl", "text"):
        raise ConfigError(f"loss {loss!r} is neither kl nor text")
    checkpoint.check_place(out)
    crew = processes(device)
    student = checkpoint.load(converted)
    told = getattr(student.config, "kv_latent", None)
    if told is None:
        raise ConfigError(f"{converted} is not a converted model; see narrows convert kv-latent")
    llm = LLM(teacher or told["base"], draft="none", dtype=dtype, device=device)
    student.to(llm.model.shape.device)
    work = work or out.with_name(f"{out.name}.work")
    count = max(8, tokens // window)
    with crew.main_process_first(), stderr.status(f"text ({text})"):
        windows = texts.kept(
            work / "text.safetensors",
            f"{llm.model.fingerprint} {text} {window} {count} {seed}",
            lambda: texts.gather(text, llm, window, count, data=data, seed=seed),
        )
    held = max(2, min(16, len(windows) // 10))
    stages = []
    for name, count, highest in (("layers", layer_steps, layer_rate), ("whole", steps, rate)):
        if count:
            stages.append((name, LoopOptions(steps=count, rate=highest, save_every=save_every)))
    with Progress("updates", visible=crew.is_main_process) as progress:
        progress.expect(sum(options.steps for _, options in stages))
        history = latent.heal(
            student,
            llm.model,
            windows[:-held],
            windows[-held:],
            work,
            data=texts.digest(windows),
            stages=stages,  # type: ignore[arg-type]
            loss=loss,  # type: ignore[arg-type]
            rank=rank,
            batch=batch,
            seed=seed,
            on_step=progress.advance,
        )
    if not crew.is_main_process:
        return
    checkpoint.write(student, converted, out)
    latent.draw(history, out / "curves.png")
    last = history[-1]
    write(
        f"{out}: {last['kl']:.4f} nats from the base on held-out text, perplexity "
        f"{math.exp(last['nll']):.2f} against {math.exp(last['base_nll']):.2f}\n"
    )


@app.command("clsr")
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


@app.command("dual")
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

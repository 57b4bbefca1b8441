"""Commands that train."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Annotated

import typer

from narrows.cli import train_listen
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

app = typer.Typer(help="Train small parts for a model.", no_args_is_help=True)
app.command("clsr")(train_listen.clsr)
app.command("dual")(train_listen.dual)

Out = Annotated[Path, typer.Option(help="Folder for the drafter; a run there goes on.")]
Target = Annotated[str, typer.Option(help="Known name, hub id, folder or GGUF.")]
Prompts = Annotated[
    Path | None, typer.Option(help="JSON Lines of prompts; default: the data folder's.")
]
Count = Annotated[int, typer.Option(help="Prompts taken from the data folder.")]
LongCount = Annotated[
    int, typer.Option(help="Extension: as many long prompts from the data folder besides.")
]
LongTokens = Annotated[int, typer.Option(help="Tokens of a long prompt, about.")]
AnswerTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]


def _asked(
    prompts: Path | None,
    data: Path | None,
    count: int,
    long_count: int,
    long_tokens: int,
    seed: int,
) -> tuple[list[str], int]:
    """What a model is to answer, and how many tokens a prompt may have with its answer."""
    from narrows.data import locate
    from narrows.train.prompts import CHARACTERS, from_data, from_file, long_from_data

    texts = from_file(prompts) if prompts else from_data(locate(data), count, seed)
    longest = 1024
    if long_count:
        texts += long_from_data(locate(data), long_count, CHARACTERS * long_tokens, seed)
        random.Random(seed).shuffle(texts)  # those held out are the last
        longest = max(longest, 2 * long_tokens)
    return texts, longest


@app.command("specformer")
def specformer(
    out: Out,
    target: Target = DEFAULT_MODEL,
    prompts: Prompts = None,
    given: Annotated[
        bool, typer.Option("--given", help="Learn from the answers in --prompts, as a control.")
    ] = False,
    data: Data = None,
    count: Count = 2000,
    long_count: LongCount = 0,
    long_tokens: LongTokens = 2000,
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
    slot_decay: Annotated[
        float, typer.Option(help="Extension: what a slot's loss counts against the one before.")
    ] = 1.0,
    linear_start: Annotated[
        bool, typer.Option(help="Extension: begin as the best linear forecast.")
    ] = False,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 6e-4,
    answer_tokens: AnswerTokens = 256,
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
    from narrows.draft.specformer import SpecFormer
    from narrows.draft.specformer_drafter import check_target
    from narrows.errors import ConfigError
    from narrows.llm import LLM
    from narrows.train import specformer
    from narrows.train.loop import LoopOptions, processes
    from narrows.train.prompts import answers_from_file

    if given and (prompts is None or long_count):
        raise ConfigError("--given needs --prompts, and no --long-count: answers come from there")
    options = LoopOptions(steps=steps, rate=rate, save_every=save_every)
    check_places(out, folders=True)
    texts, longest = _asked(prompts, data, count, long_count, long_tokens, seed)
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
            slot_decay=slot_decay,
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


@app.command("phrases")
def phrases(
    out: Out,
    target: Target = DEFAULT_MODEL,
    prompts: Prompts = None,
    data: Data = None,
    count: Count = 2000,
    long_count: LongCount = 0,
    long_tokens: LongTokens = 2000,
    answer_tokens: AnswerTokens = 256,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of prompts.")] = 0,
) -> None:
    """Phrases for a model, counted in its own answers: what follows the same few tokens most often.
    Where `train specformer` has had the same prompts answered in the same folder, those count."""
    from narrows.bench.progress import Progress
    from narrows.llm import LLM
    from narrows.train.examples import ANSWERS, answer_all
    from narrows.train.phrases import count_phrases

    check_places(out, folders=True)
    texts, longest = _asked(prompts, data, count, long_count, long_tokens, seed)
    llm = LLM(target, draft="none", dtype=dtype, device=device)
    with Progress("answers") as progress:
        progress.expect(len(texts))
        examples = answer_all(
            *(llm, texts, out / ANSWERS),
            max_tokens=answer_tokens,
            longest=longest,
            on_done=progress.advance,
        )
    made, found = count_phrases(examples, llm.model.fingerprint)
    made.save(out)
    there, right = found.found / found.places, found.right / max(1, found.found)
    write(
        f"{out}: {len(made.keys):,} phrases; for {there:.0%} of the tokens of held-out answers "
        f"there is one, and its guess is right for {right:.0%} of those\n"
    )


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

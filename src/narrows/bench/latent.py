"""``narrows bench latent``: models with fewer key and value dimensions beside their base.

A model is converted to each of some sizes, in memory and untrained; converted folders, healed or
not, stand beside it, and so do compressed caches of the base. Everything is compared with the base
within one run: bytes, predictions over whole windows of text, multiple choice, planted facts, time.
Compressed caches change what is read back, not what a pass over text predicts; so predictions are
also measured behind a prompt, token by token, where both kinds can be compared at equal bytes.
Where keys and values are of one size, what ``narrows export stock`` writes is tried in other
engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narrows.bench.cache_cost import WARM_UP, byte_rows, prefill_rows, time_rows
from narrows.bench.cache_quality import (
    BLOCK,
    Quality,
    Window,
    check_text,
    difference_rows,
    quality_rows,
    read_text,
)
from narrows.bench.cache_retrieval import ask, check_retrieval, make_probes, retrieval_rows
from narrows.bench.cache_subjects import Ours, parse_subject
from narrows.bench.choices import choice_rows, read_choices, solve
from narrows.bench.latent_models import (
    BASE,
    Candidate,
    Size,
    load_candidate,
    make_candidates,
    quarters,
    token_bytes,
)
from narrows.bench.latent_quality import OnePass, ratio_rows
from narrows.bench.latent_stock import Sample, stock_rows
from narrows.bench.likelihood import Reader
from narrows.bench.progress import Progress
from narrows.bench.prose import SOURCES, read_prose, read_windows
from narrows.bench.provenance import provenance
from narrows.bench.report import Row, row, with_provenance
from narrows.data import locate
from narrows.errors import ConfigError
from narrows.latent.convert import SMALLEST, parse_preset
from narrows.llm import LLM
from narrows.model import hub

PARTS = ("bytes", "text", "choices", "quality", "retrieval", "time", "stock")
PEERS = ("snapkv@0.5", "spindle:preset=tuned@0.5", "kivi:bits=4", "kivi:bits=2")


def run(
    *,
    model: str = "smollm2-135m",
    data: Path | None = None,
    sizes: Sequence[Size] | None = None,
    presets: Sequence[str] = ("tuned",),
    also: Sequence[Path] = (),
    peers: Sequence[str] = PEERS,
    parts: Sequence[str] = PARTS,
    vllm: bool = False,
    text: str = "own",
    looked_at: int = 32,
    windows: int = 32,
    tokens: int = 1024,
    decoded: int = 64,
    choices: int = 200,
    needles: Sequence[int] = (512, 1024, 2048),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    probes: int = 2,
    lengths: Sequence[int] = (4096, 8000),
    rounds: int = 4,
    steps: int = 16,
    dtype: str = "bfloat16",
    device: str | None = None,
    seed: int = 0,
    quick: bool = False,
    show_progress: bool = True,
) -> list[Row]:
    """Measure and return rows (see ``report.row``), provenance included.

    Args:
        model: is converted; what all others are compared with.
        data: benchmark data; None as ``data.locate``.
        sizes: of keys and values to convert to; None: all pairs of quarters of the model's heads;
            empty: only those of ``also`` are measured.
        presets: see ``latent.convert.parse_preset``; one conversion each for every size.
        also: folders of converted models.
        peers: cache specs of the base, evicting ones with a share of bytes (``snapkv@0.5``);
            ``none`` or nothing measures models alone.
        parts: of PARTS. Peers have no ``text``, no ``choices`` and no ``stock``.
        vllm: exports also in vLLM's CPU build, in an environment of its own.
        text: that conversions look at, see ``texts.gather``; ``looked_at`` windows of it.
        windows: of ``tokens`` tokens: of each source of text in the part ``text``, of all together
            in ``quality``, where the last ``decoded`` of them are fed one by one, and in
            ``stock``, where they are written.
        choices: items of each multiple-choice task.
        needles: context lengths with a planted fact; ``probes`` of each task at each of ``depths``.
        lengths: contexts behind which decoding, and prompts whose reading, is timed.
        rounds, steps: repetitions of timing, and decoding steps in each.
        dtype: of models and of what a cache keeps dense.
        seed: of text, facts and bootstrap.
        quick: tiny sizes, to see that all of it works.

    Raises ConfigError, InputError or ModelError.
    """
    if quick:
        looked_at, windows, tokens, decoded, choices, needles = 2, 2, 320, 8, 3, (320,)
        depths, probes, lengths, rounds, steps = (0.5,), 1, (320,), 1, 2
    peers = [p for p in peers if p != "none"]
    _check(parts, presets, peers, choices, rounds, steps, lengths)
    if "stock" in parts and sizes is not None and not (sizes or also):
        raise ConfigError("stock: there is nothing to export; give sizes, also, or other parts")
    folder = locate(data)
    llm = LLM(model, draft="none", dtype=dtype, device=device)
    base = Candidate(llm.model, BASE, llm.model)
    check_text(windows, tokens - decoded, decoded, llm.model)
    check_retrieval(needles, depths, probes, llm.model)
    longest = max(lengths) + WARM_UP + rounds * steps
    if "time" in parts and longest > llm.model.shape.max_tokens:
        raise ConfigError(
            f"{max(lengths)} tokens and the steps timed behind them are {longest}, but {model} "
            f"takes {llm.model.shape.max_tokens}"
        )
    compared = [Ours(llm.model, spec) for spec in peers]
    candidates = [base, *(load_candidate(f, llm.model, dtype, device) for f in also)]
    if sizes is None:
        sizes = quarters(llm.model.shape.layers[0].key_dim)
    with Progress("converted", visible=show_progress) as progress:
        progress.expect(len(sizes) * len(presets))
        candidates += make_candidates(
            llm,
            sizes,
            presets,
            text=text,
            data=data,
            windows=looked_at,
            seed=seed,
            advance=progress.advance,
        )
    bench = _Bench(candidates, compared, folder, dtype, seed, show_progress)
    rows: list[Row] = []
    if "bytes" in parts:
        rows += bench.bytes(tokens)
    if "text" in parts:
        rows += bench.text(windows, tokens)
    if "choices" in parts:
        rows += bench.choices(choices)
    if "quality" in parts:
        rows += bench.quality(windows, tokens, decoded)
    if "retrieval" in parts:
        rows += bench.retrieval(needles, depths, probes)
    if "time" in parts:
        rows += bench.time(lengths, rounds, steps)
    if "stock" in parts:
        rows += bench.stock(windows, tokens, decoded, vllm=vllm)
    facts = {c.method: c.facts for c in candidates}
    told = [{**r, **facts.get(r["method"], {}), "bench": "latent"} for r in rows]
    return with_provenance(told, provenance(seed))


class _Bench:
    """The subjects of one run: the base first among ``candidates``, and ``peers``."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        peers: Sequence[Ours],
        folder: Path,
        dtype: str,
        seed: int,
        show_progress: bool,
    ) -> None:
        self.candidates = candidates
        self.base = candidates[0]
        self.subjects: list[Ours] = [*candidates, *peers]
        names = [s.method for s in self.subjects]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"two of what is compared are called {twice[0]!r}")
        self.folder = folder
        self.seed = seed
        self.show_progress = show_progress
        self.named: dict[str, Any] = {"model": self.base.model.name, "dtype": dtype}
        self.elements = sum(layer.numbers for layer in self.base.model.shape.layers)

    def bytes(self, length: int) -> list[Row]:
        """Of a token by the model's sizes; held after a prompt, and with the room that buffers
        keep. Bits are for a number of the base's cache."""
        rows = []
        for candidate in self.candidates:
            for metric, unit, size in (
                ("token_bytes", "B/token", token_bytes(candidate.model)),
                ("reserved_bytes", "B", candidate.reserved(candidate.fill(length, seed=0))),
            ):
                rows.append(
                    row(
                        "latent",
                        **self.named,
                        part="bytes",
                        method=candidate.method,
                        engine=candidate.engine,
                        length=length,
                        metric=metric,
                        unit=unit,
                        value=float(size),
                        interval=(float(size), float(size)),
                        spread="exact",
                        n=1,
                    )
                )
        return rows + byte_rows(self.subjects, [length], self.elements, **self.named)

    def text(self, windows: int, tokens: int) -> list[Row]:
        """Predictions over whole windows, of each source by itself."""
        rows = []
        with Progress("text", visible=self.show_progress) as progress:
            progress.expect(len(SOURCES) * windows)
            for source in SOURCES:
                texts = read_windows(
                    self.folder, self.base.model, windows, tokens, self.seed, [source]
                )
                quality = OnePass(self.candidates, self.base)
                quality.read([Window([], ids) for ids in texts], progress.advance)
                where = {**self.named, "source": source, "prefix": 0, "decoded": tokens - 1}
                told = self._predicted(quality, part="text", windows=windows, **where)
                rows += told + ratio_rows(told)
        return rows

    def quality(self, windows: int, tokens: int, decoded: int) -> list[Row]:
        """Predictions behind a prompt, token by token; the compressed caches too."""
        prefix = tokens - decoded
        texts = read_text(
            self.folder,
            self.base.model,
            windows=windows,
            prefix=prefix,
            decoded=decoded,
            seed=self.seed,
        )
        quality = Quality(self.subjects, {self.base.engine: self.base})
        with Progress("quality", visible=self.show_progress) as progress:
            progress.expect(len(self.subjects) * -(-windows // BLOCK))
            quality.read(texts, progress.advance)
        where = {**self.named, "prefix": prefix, "decoded": decoded, "windows": windows}
        return self._predicted(quality, part="quality", **where)

    def _predicted(self, quality: Quality, **where: Any) -> list[Row]:
        means = quality_rows(quality, self.elements, seed=self.seed, **where)
        return means + difference_rows(quality, [BASE], seed=self.seed, **where)

    def choices(self, limit: int) -> list[Row]:
        """Multiple choice."""
        items = read_choices(self.folder, limit)
        with Progress("choices", visible=self.show_progress) as progress:
            progress.expect(len(items) * len(self.candidates))
            solved = {
                c.method: solve(Reader(c.model), items, progress.advance) for c in self.candidates
            }
        where = {**self.named, "engine": self.base.engine}
        return choice_rows(solved, items, BASE, seed=self.seed, **where)

    def retrieval(self, lengths: Sequence[int], depths: Sequence[float], count: int) -> list[Row]:
        """Planted facts, asked for after the context was read."""
        probes = make_probes(
            self.folder,
            self.base.model,
            lengths=lengths,
            depths=depths,
            count=count,
            seed=self.seed,
        )
        with Progress("retrieval", visible=self.show_progress) as progress:
            progress.expect(len(self.subjects) * -(-len(probes) // BLOCK))
            found = {s.method: ask(s, probes, progress.advance) for s in self.subjects}
        return retrieval_rows(
            self.subjects, probes, found, [BASE], seed=self.seed, question="hidden", **self.named
        )

    def time(self, lengths: Sequence[int], rounds: int, steps: int) -> list[Row]:
        """Decoding steps and prompts."""
        rows = []
        with Progress("time", visible=self.show_progress) as progress:
            progress.expect(len(lengths))
            for length in lengths:
                rows += time_rows(
                    self.subjects,
                    length,
                    [BASE],
                    rounds=rounds,
                    steps=steps,
                    seed=self.seed,
                    **self.named,
                )
                prompt = read_prose(self.folder, self.base.model, length).ids
                rows += prefill_rows(self.subjects, prompt, [BASE], rounds=rounds, **self.named)
                progress.advance()
        return rows

    def stock(self, windows: int, tokens: int, decoded: int, *, vllm: bool) -> list[Row]:
        """Exports in engines that know nothing of us: the first window is predicted, and in vLLM
        all of them are continued."""
        texts = read_windows(self.folder, self.base.model, windows, tokens, self.seed)
        sample = Sample(texts[0], [ids[:-decoded] for ids in texts], decoded)
        with Progress("stock", visible=self.show_progress) as progress:
            progress.expect(len(self.candidates) - 1)
            return stock_rows(
                self.candidates[1:],
                hub.resolve(self.base.model.name),
                sample,
                vllm=vllm,
                advance=progress.advance,
                **self.named,
            )


def _check(
    parts: Sequence[str],
    presets: Sequence[str],
    peers: Sequence[str],
    choices: int,
    rounds: int,
    steps: int,
    lengths: Sequence[int],
) -> None:
    if not parts or not set(parts) <= set(PARTS):
        raise ConfigError(f"parts: give some of {', '.join(PARTS)} (given: {', '.join(parts)})")
    if not presets:
        raise ConfigError("presets: give at least one, such as tuned")
    for preset in presets:
        parse_preset(preset, SMALLEST, SMALLEST)
    for spec in peers:
        parse_subject(spec)
    if min(choices, rounds, steps, *lengths) < 1:
        raise ConfigError("choices, rounds, steps and lengths must each be at least 1")

"""``narrows bench cache``: what kinds of cache cost and what they lose, in one run.

Bytes held, predictions against the dense cache read token by token, retrieval by depth and
length, time of a decoding step against context length, peak memory. Peers are the caches of
transformers in its own model, compared with its own dense cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narrows.bench import cache_peers
from narrows.bench.cache_cost import WARM_UP, byte_rows, memory_rows, time_rows
from narrows.bench.cache_kvpress import KVPress, open_session, parse_kvpress
from narrows.bench.cache_peers import PEERS, Peer
from narrows.bench.cache_quality import (
    BLOCK,
    Quality,
    check_text,
    difference_rows,
    quality_rows,
    read_text,
)
from narrows.bench.cache_retrieval import (
    ask,
    check_retrieval,
    make_probes,
    retrieval_rows,
    visible,
)
from narrows.bench.cache_subjects import Ours, Subject, parse_subject, subject_name
from narrows.bench.progress import Progress
from narrows.bench.prose import read_prose
from narrows.bench.provenance import provenance
from narrows.bench.report import Row, with_provenance
from narrows.data import locate
from narrows.errors import ConfigError
from narrows.model import hub
from narrows.model.flat import FlatModel

QUESTIONS = ("hidden", "visible")
PARTS = ("bytes", "quality", "retrieval", "time", "memory")
DENSE = "dense"
CACHES = (
    DENSE,
    "kivi:bits=4",
    "kivi:bits=2",
    "asymkv",
    "xquant",
    "xquant:borrow=lsq",
    "xquant:borrow=mean",
    "xquant:key_meta=int8,value_meta=int8,fold=block",
)
VERSUS = ("xquant", "quanto2")
"""What the others are compared with, where it is measured: the paper's borrower and the nearest
peer in bytes."""


def run(
    *,
    model: str = "smollm2-135m",
    data: Path | None = None,
    caches: Sequence[str] = CACHES,
    peers: Sequence[str] = ("quanto4", "quanto2", "hqq2"),
    versus: Sequence[str] | None = None,
    parts: Sequence[str] = PARTS,
    windows: int = 16,
    prefix: int = 1536,
    decoded: int = 128,
    held: Sequence[int] = (1024, 4096, 8192),
    retrieval: Sequence[int] = (1024, 2048),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    probes: int = 4,
    questions: Sequence[str] = ("hidden",),
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8000),
    rounds: int = 8,
    steps: int = 16,
    memory: int = 4096,
    dtype: str = "bfloat16",
    device: str | None = None,
    seed: int = 0,
    quick: bool = False,
    show_progress: bool = True,
) -> list[Row]:
    """Measure and return rows (see ``report.row``), provenance included.

    Args:
        model: runs with every cache.
        data: benchmark data; None as ``data.locate``.
        caches: our specs; the dense one is always measured.
        peers: of ``cache_peers.PEERS``; the dense one is measured with any other. ``none`` or
            nothing measures ours alone.
        versus: specs or peers that all others are compared with, besides the dense cache in
            time; None takes VERSUS where measured.
        parts: of PARTS.
        windows: of text, each a ``prefix`` read as a prompt and ``decoded`` tokens fed after it.
        held: prompt lengths at which bytes are counted.
        retrieval: context lengths with a planted fact; ``probes`` of each task at each depth.
        questions: of QUESTIONS: whether a cache is compressed before it sees the question.
        lengths: contexts behind which decoding is timed; those beyond the window are left out.
        rounds, steps: repetitions of timing, and decoding steps in each.
        memory: length of the prompt that peak memory is measured with.
        dtype: of the model and of what a cache keeps dense.
        seed: of text, facts and bootstrap.
        quick: tiny sizes, to see that all of it works.

    Raises ConfigError, InputError or ModelError.
    """
    if quick:
        windows, prefix, decoded, held, retrieval = 2, 320, 8, (320,), (320,)
        depths, probes, lengths, rounds, steps, memory = (0.5,), 1, (320,), 1, 2, 320
    peers = [p for p in peers if p != "none"]
    specs = _specs(caches)
    _check(parts, questions, peers, rounds, steps, held, lengths)
    needs_text = bool(set(parts) - {"bytes", "time"})
    folder = locate(data) if needs_text else Path()
    loaded = FlatModel.load(model, dtype=dtype, device=device)
    if "quality" in parts:
        check_text(windows, prefix, decoded, loaded)
    if "retrieval" in parts:
        check_retrieval(retrieval, depths, probes, loaded)
    subjects: list[Subject] = [Ours(loaded, spec) for spec in specs]
    if peers:
        stock = cache_peers.load_stock(loaded, model, dtype)
        names = dict.fromkeys((cache_peers.DENSE, *peers))
        pressed = [name for name in names if parse_kvpress(name)]
        subjects += [Peer(stock, loaded.shape, n) for n in names if n not in pressed]
        if pressed:
            session = open_session(hub.resolve(model), dtype)
            bits = 8.0 * loaded.shape.dtype.itemsize
            subjects += [KVPress(session, name, bits) for name in pressed]
    bench = _Bench(loaded, subjects, _versus(versus, subjects), dtype, seed, show_progress)
    window = loaded.shape.max_tokens
    rows: list[Row] = []
    if "bytes" in parts:
        rows += byte_rows(subjects, held, bench.elements, **bench.named)
    if "quality" in parts:
        rows += bench.quality(folder, windows=windows, prefix=prefix, decoded=decoded)
    if "retrieval" in parts:
        rows += bench.retrieval(
            folder, lengths=retrieval, depths=depths, count=probes, questions=questions
        )
    if "time" in parts:
        fitting = [n for n in lengths if n + WARM_UP + rounds * steps <= window]
        rows += bench.time(fitting, rounds=rounds, steps=steps)
    if "memory" in parts:
        prompt = read_prose(folder, loaded, min(memory, window - steps)).ids
        place = loaded.shape.device
        rows += memory_rows(bench.here, prompt, place, steps=steps, **bench.named)
    return with_provenance(rows, provenance(seed))


class _Bench:
    """The subjects of one run and what they are compared with."""

    def __init__(
        self,
        model: FlatModel,
        subjects: Sequence[Subject],
        versus: Sequence[str],
        dtype: str,
        seed: int,
        show_progress: bool,
    ) -> None:
        self.model = model
        self.subjects = subjects
        # What is asked through a pipe cannot be timed or weighed beside the others.
        self.here = [s for s in subjects if not isinstance(s, KVPress)]
        self.versus = versus
        self.seed = seed
        self.show_progress = show_progress
        self.named: dict[str, Any] = {"model": model.name, "dtype": dtype}
        self.elements = sum(layer.numbers for layer in model.shape.layers)

    def quality(self, folder: Path, *, windows: int, prefix: int, decoded: int) -> list[Row]:
        """Predictions over windows of text."""
        text = read_text(
            folder, self.model, windows=windows, prefix=prefix, decoded=decoded, seed=self.seed
        )
        dense = {s.engine: s for s in self.subjects if s.method in (DENSE, cache_peers.DENSE)}
        quality = Quality(self.subjects, dense)
        with Progress("text", visible=self.show_progress) as progress:
            progress.expect(len(self.subjects) * -(-windows // BLOCK))
            quality.read(text, progress.advance)
        where = {**self.named, "prefix": prefix, "decoded": decoded, "windows": windows}
        return quality_rows(quality, self.elements, seed=self.seed, **where) + difference_rows(
            quality, self.versus, seed=self.seed, **where
        )

    def retrieval(
        self,
        folder: Path,
        *,
        lengths: Sequence[int],
        depths: Sequence[float],
        count: int,
        questions: Sequence[str],
    ) -> list[Row]:
        """Planted facts."""
        probes = make_probes(
            folder, self.model, lengths=lengths, depths=depths, count=count, seed=self.seed
        )
        rows = []
        with Progress("retrieval", visible=self.show_progress) as progress:
            progress.expect(len(questions) * len(self.subjects) * -(-len(probes) // BLOCK))
            for question in questions:
                asked = [visible(p) for p in probes] if question == "visible" else probes
                found = {s.method: ask(s, asked, progress.advance) for s in self.subjects}
                where = {**self.named, "question": question}
                rows += retrieval_rows(
                    self.subjects, probes, found, self.versus, seed=self.seed, **where
                )
        return rows

    def time(self, lengths: Sequence[int], *, rounds: int, steps: int) -> list[Row]:
        """Decoding steps."""
        rows = []
        timed = [s.method for s in self.here]
        versus = [DENSE, *(name for name in self.versus if name in timed)]
        with Progress("time", visible=self.show_progress) as progress:
            progress.expect(len(lengths))
            for length in lengths:
                rows += time_rows(
                    self.here,
                    length,
                    versus,
                    rounds=rounds,
                    steps=steps,
                    seed=self.seed,
                    **self.named,
                )
                progress.advance()
        return rows


def points(rows: Sequence[Row]) -> list[Row]:
    """The rows to draw: mean KL divergence, without the dense caches, which have none. A method
    at several shares of bytes is one ``series``."""
    drawn = [r for r in rows if r["metric"] == "kl" and r["value"] > 0]
    return [{**r, "series": r["method"].partition("@")[0]} for r in drawn]


def _specs(caches: Sequence[str]) -> list[str]:
    """The specs as their policies write them, the dense one first, each once."""
    return list(dict.fromkeys(_named(spec) for spec in (DENSE, *caches)))


def _named(spec: str) -> str:
    return subject_name(*parse_subject(spec))


def _versus(given: Sequence[str] | None, subjects: Sequence[Subject]) -> list[str]:
    measured = [s.method for s in subjects]
    if given is None:
        return [name for name in VERSUS if name in measured]
    names = [n if n in PEERS or parse_kvpress(n) else _named(n) for n in given]
    for name in names:
        if name not in measured:
            raise ConfigError(f"versus: {name!r} is not measured (measured: {', '.join(measured)})")
    return list(dict.fromkeys(names))


def _check(
    parts: Sequence[str],
    questions: Sequence[str],
    peers: Sequence[str],
    rounds: int,
    steps: int,
    held: Sequence[int],
    lengths: Sequence[int],
) -> None:
    for name, given, known in (("parts", parts, PARTS), ("questions", questions, QUESTIONS)):
        if not given or not set(given) <= set(known):
            raise ConfigError(
                f"{name}: give some of {', '.join(known)} (given: {', '.join(given)})"
            )
    cache_peers.check_peers(peers)
    if rounds < 1 or steps < 1:
        raise ConfigError("rounds and steps must each be at least 1")
    if min([*held, *lengths], default=1) < 1:
        raise ConfigError("lengths must each be at least 1")

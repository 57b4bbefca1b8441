"""Commands that hear recordings and find what was said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrows.cli.options import AsJson, check_places, stderr, write

app = typer.Typer(help="Hear recordings once, ask what was said in them.", no_args_is_help=True)

Backend = Annotated[
    str | None, typer.Option(help="What hears, such as transcript or transcript:language=en.")
]


@contextmanager
def hearing(files: Sequence[str]) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, to be told of the seconds of the files that were heard. Raises
    InputError for a file that cannot be opened."""
    from narrows.bench.progress import Progress
    from narrows.retrieve.audio import seconds_of

    lengths = [seconds_of(file) or 0.0 for file in files]
    with Progress("hearing", visible=sys.stderr.isatty()) as bar:
        bar.expect(sum(lengths))
        yield bar.advance


@app.command("index")
def index(
    files: Annotated[list[str], typer.Argument(help="WAV, FLAC, MP3, Ogg, M4A and the like.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index; it may grow.")],
    backend: Backend = None,
    window: Annotated[
        float | None, typer.Option(help="Cut clips of so many seconds; default: at pauses.")
    ] = None,
) -> None:
    """Hear recordings and put them into an index. What it holds is not heard again."""
    from narrows.listen import at
    from narrows.listen import index as hear

    with hearing(files) as on_heard:
        made = hear(files, out, backend=backend, window=window, on_heard=on_heard)
    for entry in made.entries:
        if not entry.clips:
            stderr.print(f"[dim]no speech found in {escape(entry.name)}[/dim]")
    clips = sum(entry.clips for entry in made.entries)
    length = at(sum(entry.seconds for entry in made.entries))
    stderr.print(
        f"[dim]{len(made.entries)} recordings, {length} of sound, {clips} clips in {out}, heard by "
        f"{made.origin.backend}[/dim]"
    )


@app.command("search")
def search(
    index: Annotated[Path, typer.Argument(help="What narrows listen index made.")],
    question: Annotated[str, typer.Argument(help="What to find.")],
    k: Annotated[int, typer.Option("-k", help="Most clips to show.")] = 5,
    mode: Annotated[str, typer.Option(help="fused, vectors or words.")] = "fused",
    rerank: Annotated[
        int,
        typer.Option(help="Transcribe so many of the best clips by Whisper and rank them by that."),
    ] = 0,
    play: Annotated[
        Path | None, typer.Option(help="Write the sound of the best clip here, as WAV.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where in the recordings a question is answered, the best clip first."""
    from narrows.listen import at, sound
    from narrows.listen import search as find
    from narrows.retrieve.audio import write_wav

    check_places(play)
    hits = find(index, question, k, mode=mode, rerank=rerank)
    if play is not None and hits:
        best = hits[0]
        (wave,) = sound(best.name, best.digest, [(best.start, best.end)])
        write_wav(play, wave)
    if as_json:
        rows = [asdict(hit) for hit in hits]
        write(json.dumps({"question": question, "hits": rows}, ensure_ascii=False) + "\n")
        return
    if not hits:
        stderr.print("[dim]nothing found[/dim]")
        return
    table = Table(box=None)
    for column in ("recording", "time", "score", "said"):
        table.add_column(column)
    for hit in hits:
        time = f"{at(hit.start)}-{at(hit.end)}"
        table.add_row(escape(Path(hit.name).name), time, f"{hit.score:.4f}", escape(hit.text))
    Console().print(table)

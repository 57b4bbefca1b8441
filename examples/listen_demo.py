"""Half an hour of speech, made here, and a question about it.

flite reads Kennedy's address of 1961 into a WAV; that is indexed, searched and asked, through the
command line, so that what you see is what you would type.

    python examples/listen_demo.py            # build/speech.wav, build/speech.index
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from narrows.errors import NarrowsError
from narrows.retrieve.audio import RATE, write_wav
from narrows.train.speech import FLITE, speak
from narrows.train.spoken_text import cut, verbalised

TEXT = Path(__file__).with_name("state_of_the_union.txt")
SPEECH, INDEX = Path("build/speech.wav"), "build/speech.index"
MINUTES = 30
PAUSE_S = 0.7
QUESTION = "What goal did Kennedy set about landing a man on the moon?"
PROGRAM = "from narrows.cli import main; main()"


def record(path: Path) -> None:
    """Read the text aloud for MINUTES, as one file."""
    pause = np.zeros(int(PAUSE_S * RATE), np.float32)
    parts: list[np.ndarray] = []
    for stretch in filter(None, cut(verbalised(TEXT.read_text()))):
        if sum(map(len, parts)) >= MINUTES * 60 * RATE:
            break
        parts += [speak(stretch, (FLITE, "slt"), 1.1), pause]
    path.parent.mkdir(exist_ok=True)
    write_wav(path, np.concatenate(parts))


def narrows(*words: str) -> None:
    """Run a command, shown as it would be typed."""
    print("$ narrows", " ".join(f'"{w}"' if " " in w else w for w in words), flush=True)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words]).returncode
    if done:
        sys.exit(done)


if __name__ == "__main__":
    try:
        if not SPEECH.exists():
            record(SPEECH)
    except NarrowsError as error:
        sys.exit(f"listen_demo: {error}")
    narrows("listen", "index", str(SPEECH), "-o", INDEX)
    narrows("listen", "search", INDEX, QUESTION, "-k", "2")
    narrows("ask", "--audio", str(SPEECH), QUESTION)

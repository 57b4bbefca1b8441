"""The main job on a real document: eight State of the Union addresses, 1961 to 2002.

The text is several times longer than the model's window of 8,192 tokens. The same question is
asked through the command line, so that what you see is what you would type.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DOCUMENT = os.path.relpath(Path(__file__).with_name("state_of_the_union.txt"))
QUESTION = "What goal did Kennedy set about landing a man on the moon?"
COMMAND = ["ask", "--doc", DOCUMENT, "--budget", "400", QUESTION]

if __name__ == "__main__":
    print("$ narrows", " ".join(f'"{x}"' if " " in x else x for x in COMMAND), flush=True)
    program = "from narrows.cli import main; main()"
    sys.exit(subprocess.run([sys.executable, "-c", program, *COMMAND]).returncode)

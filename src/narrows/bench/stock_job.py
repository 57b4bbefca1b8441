"""Reads text with plain transformers. Run as a program of its own, which never imports narrows: a
checkpoint that loads here needs nothing of us.

Reads a JSON object from the file named first (``model``, ``ids``, and ``logits``, where to put
those after each of the ids, float32 ``[ids, vocabulary]``), writes an empty one to the file named
second once that is done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    """Run the job; a failure ends the program with a traceback, for its parent to report."""
    import numpy
    import torch
    from transformers import AutoModelForCausalLM

    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([job["ids"]]), use_cache=False).logits[0]
    if "narrows" in sys.modules:
        raise RuntimeError("narrows was imported, so this says nothing about a stock checkpoint")
    numpy.save(job["logits"], logits.numpy())
    Path(result_file).write_text("{}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Times vLLM. Run as a program by an environment that has vLLM, never imported by ours.

Reads a JSON object from the file named first (``model``, ``dtype``, ``batches`` of token id
lists, ``new_tokens``, ``repeats``, ``max_tokens``), writes one to the file named second:
``batches``, for each ``total_s`` and ``first_s``, seconds of writing all tokens and of one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    """Run the job; a failure ends the program with a traceback, for its parent to report."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_tokens"],
        enable_prefix_caching=False,  # the same prompts come again and again
        seed=0,
    )

    def seconds(prompts: list[list[int]], count: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - started

    batches = []
    for prompts in job["batches"]:
        seconds(prompts, 2)
        rounds = [
            (seconds(prompts, job["new_tokens"]), seconds(prompts, 1))
            for _ in range(job["repeats"])
        ]
        batches.append({"total_s": [a for a, _ in rounds], "first_s": [b for _, b in rounds]})
    Path(result_file).write_text(json.dumps({"batches": batches}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Reads and continues text with vLLM. Run as a program by an environment that has vLLM, never
imported by ours.

Reads a JSON object from the file named first (``model``, ``dtype``, ``text``, its token ids,
``prompts``, lists of such, ``new_tokens``, ``max_tokens``), writes one to the file named second:
``logprobs``, in nats, of each token of the text but the first, and ``tokens``, what follows each
prompt greedily.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    """Run the job; a failure ends the program with a traceback, for its parent to report."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    llm = LLM(model=job["model"], dtype=job["dtype"], max_model_len=job["max_tokens"], seed=0)

    def generate(prompts: list[list[int]], **options: Any) -> list[Any]:
        params = SamplingParams(temperature=0.0, ignore_eos=True, **options)
        asked = [{"prompt_token_ids": p} for p in prompts]
        made: list[Any] = llm.generate(asked, params, use_tqdm=False)
        return made

    text = job["text"]
    (read,) = generate([text], max_tokens=1, prompt_logprobs=0)
    written = generate(job["prompts"], max_tokens=job["new_tokens"])
    pairs = zip(text[1:], read.prompt_logprobs[1:], strict=True)
    result = {
        "logprobs": [likely[token].logprob for token, likely in pairs],
        "tokens": [list(one.outputs[0].token_ids) for one in written],
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

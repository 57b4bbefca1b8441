"""Times the package llmlingua. Run as a program by an environment that has it, never imported by
ours.

Reads a JSON object from the file named first (``model``, ``dtype``, ``passages``,
``target_tokens``), writes one to the file named second: ``seconds`` of compressing the passages,
and ``kept``, the tokens of the result.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    """Run the job; a failure ends the program with a traceback, for its parent to report."""
    import tiktoken  # type: ignore[import-not-found,unused-ignore]
    import torch
    from transformers import AutoTokenizer

    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    folder = _older(Path(job["model"]), Path("model"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    class Counter:
        def encode(self, text: str, **_: Any) -> list[int]:
            ids: list[int] = tokenizer(text)["input_ids"]
            return ids

    # It counts in a vocabulary that must be fetched; counting in the model's own needs no network
    # and makes its target ours.
    tiktoken.encoding_for_model = lambda *_: Counter()
    from llmlingua import PromptCompressor  # type: ignore[import-not-found,unused-ignore]

    compressor = PromptCompressor(
        folder, device_map="cpu", model_config={"torch_dtype": getattr(torch, job["dtype"])}
    )

    def compress(passages: list[str], target: int) -> dict[str, Any]:
        found: dict[str, Any] = compressor.compress_prompt(passages, target_token=target)
        return found

    compress(job["passages"][:2], 100)  # what only the first call pays
    started = time.perf_counter()
    done = compress(job["passages"], job["target_tokens"])
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "kept": done["compressed_tokens"]}
    Path(result_file).write_text(json.dumps(result))


def _older(source: Path, folder: Path) -> str:
    """The model, its configuration written as transformers 4 reads it: the rotary base by
    itself, and a tokenizer class that it knows."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors" or file.name == "tokenizer.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    rotary = config.pop("rope_parameters", {})
    if rotary.get("rope_type", "default") != "default":
        raise ValueError(f"rotary type {rotary['rope_type']} is not translated for transformers 4")
    config["rope_theta"] = rotary.get("rope_theta", config.get("rope_theta", 10000.0))
    (folder / "config.json").write_text(json.dumps(config))
    known = json.loads((source / "tokenizer_config.json").read_text())
    words = {k: v for k, v in known.items() if k.endswith("_token") and isinstance(v, str)}
    words["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return str(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])

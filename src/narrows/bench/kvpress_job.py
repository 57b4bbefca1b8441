"""Holds kvpress's caches. Run as a program by an environment that has it, never imported by ours.

The file named by its argument holds a JSON object: ``model``, ``dtype``. Then every line of
standard input is one, and is answered by one on standard output:

* ``read`` (token ids), ``press``, ``ratio`` (the share dropped): ``reader``, a number, and
  ``held``, the bytes of its cache.
* ``step``: pairs of a reader and its next token; ``file``: where to put the logits, float32
  ``[pairs, vocabulary]``. Answers with ``held``, a number each.
* ``keys``: a reader; ``file``: where to put its keys, an array ``[heads, tokens, dim]`` a layer.
* ``forget``: a reader.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("SnapKVPress", {"window_size": 64, "kernel_size": 5}),
    "pyramidkv": ("PyramidKVPress", {"window_size": 64, "kernel_size": 5, "beta": 20}),
    "expected": ("ExpectedAttentionPress", {"n_sink": 4}),
    "streaming": ("StreamingLLMPress", {"n_sink": 4}),
    "tova": ("TOVAPress", {}),
    "knorm": ("KnormPress", {}),
    "keydiff": ("KeyDiffPress", {}),
}
"""Peers by name: kvpress's class and its options."""


class Worker:
    """The model and the readers."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model: Any = loaded.eval()
        self.readers: dict[int, tuple[Any, int]] = {}
        self.count = 0

    def read(self, read: list[int], press: str, ratio: float) -> dict[str, Any]:
        """See the module."""
        import kvpress  # type: ignore[import-not-found,unused-ignore]
        from transformers import DynamicCache

        name, options = PRESSES[press]
        made = getattr(kvpress, name)(compression_ratio=ratio, **options)
        cache = DynamicCache()
        with self.torch.inference_mode(), made(self.model):
            self.model.model(self.torch.tensor([read]), past_key_values=cache)
        self.count += 1
        self.readers[self.count] = cache, len(read)
        return {"reader": self.count, "held": self.held(self.count)}

    def step(self, step: list[tuple[int, int]], file: str) -> dict[str, Any]:
        """See the module."""
        import numpy

        rows, sizes = [], []
        for number, token in step:
            cache, length = self.readers[number]
            ids = self.torch.tensor([[token]])
            places = self.torch.tensor([[length]])
            with self.torch.inference_mode():
                made = self.model(ids, past_key_values=cache, position_ids=places)
            self.readers[number] = cache, length + 1
            rows.append(made.logits[0, -1].float().numpy())
            sizes.append(self.held(number))
        numpy.save(file, numpy.stack(rows))
        return {"held": sizes}

    def keys(self, keys: int, file: str) -> dict[str, Any]:
        """See the module."""
        import numpy

        held = [layer.keys[0].float().numpy() for layer in self.readers[keys][0].layers]
        numpy.savez(file, *held)
        return {}

    def forget(self, forget: int) -> dict[str, Any]:
        """See the module."""
        del self.readers[forget]
        return {}

    def held(self, number: int) -> int:
        """Bytes of distinct storages."""
        storages = {}
        for layer in self.readers[number][0].layers:
            for tensor in (layer.keys, layer.values):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def main(job_file: str) -> None:
    """Answer until the input ends; a failure ends the program with a traceback."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    job = json.loads(Path(job_file).read_text())
    worker = Worker(job["model"], job["dtype"])
    for line in sys.stdin:
        ask = json.loads(line)
        told = getattr(worker, next(n for n in ("read", "step", "keys", "forget") if n in ask))(
            **ask
        )
        answers.write(json.dumps(told) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

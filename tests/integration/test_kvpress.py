"""Our eviction keeps what kvpress keeps, token for token, where its environment has been made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from narrows.bench.peers import KVPRESS
from narrows.cache.stack import parse_cache
from narrows.contracts import FlatBatch
from narrows.model import hub
from narrows.model.flat import FlatModel

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        not (hub.cache_dir() / "peers" / f"{KVPRESS.packages[0]}.ready").exists(),
        reason="no environment with kvpress: narrows bench cache --peer kvpress-snapkv@0.5",
    ),
]
PRESSES = ["snapkv", "pyramidkv", "streaming", "tova", "expected", "keydiff"]


@pytest.fixture(scope="module")
def model():
    return FlatModel.load("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def session():
    return KVPRESS.open({"model": str(hub.resolve("smollm2-135m")), "dtype": "float32"})


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_the_same_tokens_stay(press, keep, model, session, tmp_path):
    text = " ".join(f"{i} times {i + 3} is {i * (i + 3)}, and so on." for i in range(60))
    ids = model.tokenizer(text)["input_ids"][:600]
    reader = session.ask({"read": ids, "press": press, "ratio": 1 - keep})["reader"]
    session.ask({"keys": reader, "file": str(tmp_path / "keys.npz")})
    theirs = np.load(tmp_path / "keys.npz")
    spec = {"keydiff": "evict:score=key_difference,window=1,heads=mean"}.get(press, press)
    caches = parse_cache(spec).build(model.shape)
    places = torch.arange(len(ids))
    model.hidden(torch.tensor(ids), places, FlatBatch([(0, len(ids))], [caches]))
    differ = total = 0
    for number, cache in enumerate(caches):
        keys = torch.from_numpy(theirs[f"arr_{number}"]).double()
        for head, mine in enumerate(cache.choice(keep).tokens):
            every = cache.prompt.k[head, : len(ids)].double()
            kept = torch.cdist(keys[head], every).argmin(1).tolist()
            differ += len(set(kept) ^ set(mine.tolist()))
            total += len(kept)
    # These two sum so many rounded numbers that ties of the seventh digit fall either way.
    assert differ <= (total * 1e-2 if press in ("expected", "keydiff") else 0)

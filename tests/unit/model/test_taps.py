"""Tapped hidden states are transformers' own, on the fast path and on the reference."""

import pytest
import torch

from narrows.cache.dense import DensePolicy
from narrows.contracts import FlatBatch
from tiny import FAMILIES, pair, prompts


@pytest.mark.parametrize("rows", [None, [1, 3, 4]])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_the_hidden_states_of_transformers(family, fast, rows, monkeypatch):
    flat, stock = pair(family)
    if not fast:
        monkeypatch.setattr(flat, "_fast", None)
    (ids,) = prompts(1, seed=3)
    layers = len(flat.shape.layers)
    wanted = (0, layers // 2, layers - 1, layers)
    batch = FlatBatch([(0, len(ids))], [DensePolicy().build(flat.shape)])
    places = torch.arange(len(ids))
    seen = places if rows is None else torch.tensor(rows)
    only = None if rows is None else seen
    hidden, taps = flat.hidden_and_taps(torch.tensor(ids), places, batch, wanted, only)
    with torch.no_grad():
        base = stock.base_model(torch.tensor([ids]), output_hidden_states=True)
    for place, number in enumerate(wanted):
        expected = base.hidden_states[number][0, seen]
        torch.testing.assert_close(taps[:, place], expected, rtol=2e-4, atol=2e-4)
    assert torch.equal(taps[:, -1], hidden[seen])

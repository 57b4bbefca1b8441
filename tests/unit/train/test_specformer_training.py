"""Training a drafter: its gradients, its data, and going on after a stop."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from narrows.draft.specformer import SpecFormer, SpecFormerConfig
from narrows.errors import InputError, NumericalError
from narrows.train.examples import Example
from narrows.train.loop import CHECKPOINT, HISTORY, LoopOptions, rate_at, train
from narrows.train.prompts import from_data, from_file
from narrows.train.specformer import SpecFormerObjective
from tiny import pair, prompts


def module(**changes: object) -> SpecFormer:
    torch.manual_seed(3)
    return SpecFormer(SpecFormerConfig.of(pair("llama")[0], **{"slots": 3, **changes}))


def examples(count: int = 6) -> list[Example]:
    """Texts that repeat themselves, so that there is something to learn."""
    return [Example((p * 30)[:30], 6) for p in prompts(count, longest=7, seed=4)]


def objective(made: SpecFormer, **options: int) -> SpecFormerObjective:
    return SpecFormerObjective(made, pair("llama")[0], examples(), **options)


def test_gradients_are_those_of_the_summed_loss():
    """Slot by slot gives what one graph of everything gives (T9)."""
    made = module()
    goal = objective(made, tokens=120)
    told = goal.gradients(0)
    mine = {n: p.grad.clone() for n, p in made.named_parameters()}
    made.zero_grad()
    x, labels = goal.rows(goal.chosen(0))
    slots = made.slots(x)
    known = labels >= 0
    loss = cross_entropy(goal.scores(slots[known]), labels[known], reduction="mean")
    loss.backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-4, atol=1e-6)
    assert told["tokens"] == len(x)


def test_a_slot_learns_the_token_two_and_more_ahead():
    goal = objective(module(), tokens=30)
    (example,) = goal.chosen(0)
    x, labels = goal.rows([example])
    assert len(x) == len(labels) == len(example.tokens) - 2 - (example.start - 1)
    for row, found in enumerate(labels.tolist()):
        t = example.start - 1 + row
        expected = [*example.tokens, *[-1] * 5][t + 2 : t + 5]
        assert found == expected


def test_every_epoch_reads_every_example_once():
    goal = objective(module(), tokens=60)
    texts = [e.tokens for step in range(6) for e in goal.chosen(step)]
    count = len(goal.examples)
    for start in range(0, len(texts) - count + 1, count):
        epoch = sorted(texts[start : start + count])
        assert epoch == sorted(e.tokens for e in goal.examples)


def run(folder, steps=12, stop=None, **options):
    made = module()
    goal = objective(made, tokens=120)

    def gradients(step):
        if stop is not None and step == stop:
            raise KeyboardInterrupt
        return goal.gradients(step)

    loop = LoopOptions(steps=steps, rate=3e-3, save_every=4, **options)
    check = lambda: goal.check(goal.examples)  # noqa: E731
    return made, train(made, gradients, folder, loop, data="x", check=check)


def test_it_learns_and_a_stopped_run_goes_on_as_if_never_stopped(tmp_path):
    whole, history = run(tmp_path / "a", steps=40)
    assert history[-1]["kappa"] > history[3]["kappa"] + 0.3
    assert history[-1]["loss"] < history[0]["loss"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", steps=40, stop=22)
    again, resumed = run(tmp_path / "b", steps=40)
    assert [r["step"] for r in resumed] == list(range(40))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    told = [json.loads(x) for x in (tmp_path / "b" / HISTORY).read_text().splitlines()]
    assert told == resumed


def test_bad_checkpoints_are_refused_and_stay(tmp_path):
    run(tmp_path, steps=4)
    kept = (tmp_path / CHECKPOINT).read_bytes()
    made = module()
    goal = objective(made)
    with pytest.raises(InputError, match="other data"):
        train(made, goal.gradients, tmp_path, LoopOptions(steps=8), data="y")
    with pytest.raises(InputError, match="other sizes"):
        train(module(slots=2), goal.gradients, tmp_path, LoopOptions(steps=8), data="x")
    with pytest.raises(NumericalError, match="step 4"):
        train(made, lambda step: {"loss": float("nan")}, tmp_path, LoopOptions(steps=8), data="x")
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
    (tmp_path / CHECKPOINT).write_bytes(kept[:100])
    with pytest.raises(InputError, match="damaged"):
        train(made, goal.gradients, tmp_path, LoopOptions(steps=8), data="x")


def test_a_disk_that_fills_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, steps=4)
    kept = (tmp_path / CHECKPOINT).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("narrows.train.loop.save_file", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, steps=8)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_the_rate_rises_and_falls():
    options = LoopOptions(steps=100, rate=1.0)
    rates = [rate_at(options, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[5] == pytest.approx(1.0)
    assert rates == [*sorted(rates[:5]), *sorted(rates[5:], reverse=True)]
    assert rates[-1] == pytest.approx(0.02, abs=2e-3)


def test_prompts(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b", "id": 3}\n')
    assert from_file(path) == ["a", "b"]
    path.write_text('{"prompt": "a"}\n{"prompt": "  "}\n')
    with pytest.raises(InputError, match="row 2"):
        from_file(path)
    with pytest.raises(InputError, match="has no"):
        from_data(tmp_path, 3)

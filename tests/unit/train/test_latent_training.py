"""Healing of converted models; sheet section 12, oracles 11 to 13."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from narrows.errors import ConfigError
from narrows.model.flat import FlatModel
from narrows.train.latent import LatentObjective, draw, heal, merge, prepare
from narrows.train.loop import LoopOptions
from tiny import pair, prompts
from tiny_latent import SUBSET, base, converted, flat, logits

WINDOWS = [(p * 40)[:24] for p in prompts(40, seed=11)]


def teacher() -> FlatModel:
    return pair("llama", head_dim=32, sliding_window=None)[0]


def student(qk: int = 16, vo: int = 16, **options: Any) -> Any:
    made = copy.deepcopy(converted("llama", qk, vo, **{**SUBSET, **options}))
    made.set_attn_implementation("sdpa")
    prepare(made, rank=0, alpha=1.0)
    return made


def objective(made: Any, stage: str, **options: Any) -> LatentObjective:
    return LatentObjective(made, teacher(), WINDOWS[:30], stage, batch=3, **options)


def slopes(made: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


def test_only_attention_is_trained_and_all_of_it() -> None:
    made = student()
    free = {n for n, p in made.named_parameters() if p.requires_grad}
    assert free == {n for n, _ in made.named_parameters() if ".self_attn." in n}
    for stage in ("layers", "whole"):
        made.zero_grad()
        objective(made, stage).gradients(0)
        assert set(slopes(made)) == free


@pytest.mark.parametrize("stage", ["layers", "whole"])
def test_at_full_sizes_there_is_nothing_to_learn(stage: str) -> None:
    made = student(32, 32)
    told = objective(made, stage).gradients(0)
    assert told["loss"] == pytest.approx(0, abs=1e-6)
    assert max(g.abs().max() for g in slopes(made).values()) < 1e-4


def test_layers_learn_apart() -> None:
    """What one layer does changes the gradients of no other, and its own."""
    made = student()
    objective(made, "layers").gradients(0)
    before = slopes(made)
    made.zero_grad()
    made.base_model.layers[1].self_attn.v_proj.weight.data.mul_(1.5)
    objective(made, "layers").gradients(0)
    for name, slope in slopes(made).items():
        assert torch.equal(slope, before[name]) is (".layers.1." not in name), name


def test_divergence_and_its_gradient_are_those_of_autograd() -> None:
    made = student()
    told = objective(made, "whole")
    loss = told.gradients(0)["loss"]
    found = slopes(made)
    made.zero_grad()
    ids = told.chosen(0)
    stock = base("llama")
    with torch.no_grad():
        wanted = stock(ids).logits.log_softmax(-1)
    apart = kl_div(made(ids).logits.log_softmax(-1), wanted, log_target=True, reduction="sum")
    (apart / ids.numel()).backward()
    assert loss == pytest.approx(float(apart.detach()) / ids.numel(), rel=1e-4)
    for name, slope in slopes(made).items():
        torch.testing.assert_close(found[name], slope, rtol=1e-3, atol=1e-5)


def test_text_loss_and_its_gradient_are_cross_entropy() -> None:
    made = student()
    told = objective(made, "whole", loss="text")
    loss = told.gradients(0)["loss"]
    found = slopes(made)
    made.zero_grad()
    ids = told.chosen(0)
    wanted = cross_entropy(made(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, slope in slopes(made).items():
        torch.testing.assert_close(found[name], slope, rtol=1e-3, atol=1e-5)


def test_check_tells_divergence_and_both_surprisals() -> None:
    made = student()
    told = objective(made, "whole").check(WINDOWS[30:34])
    wanted = {"kl": 0.0, "nll": 0.0, "base_nll": 0.0}
    for window in WINDOWS[30:34]:
        given, theirs = (logits(m, window)[:-1].log_softmax(-1) for m in (made, base("llama")))
        truth = torch.tensor(window[1:])
        wanted["kl"] += float((theirs.exp() * (theirs - given)).sum(-1).mean()) / 4
        wanted["nll"] += float(cross_entropy(given, truth)) / 4
        wanted["base_nll"] += float(cross_entropy(theirs, truth)) / 4
    assert told == pytest.approx(wanted, rel=1e-4)


def test_lora_does_nothing_at_first_and_stays_when_merged() -> None:
    plain = student()
    made = copy.deepcopy(converted("llama", 16, 16, **SUBSET))
    made.set_attn_implementation("sdpa")
    prepare(made, rank=4, alpha=8.0)
    ids = WINDOWS[0]
    torch.testing.assert_close(logits(made, ids), logits(plain, ids), rtol=0, atol=0)
    for name, p in made.named_parameters():
        if name.endswith(".b"):
            p.data.normal_(0, 0.1)
    lora = made.base_model.layers[0].mlp.up_proj.parametrizations.weight[0]
    whole = plain.base_model.layers[0].mlp.up_proj.weight + 8 / 4 * lora.b @ lora.a
    changed = logits(made, ids)
    assert not torch.allclose(changed, logits(plain, ids))
    merge(made)
    torch.testing.assert_close(made.base_model.layers[0].mlp.up_proj.weight, whole)
    torch.testing.assert_close(logits(made, ids), changed)
    assert set(dict(made.named_parameters())) == set(dict(plain.named_parameters()))


STAGES = (
    ("layers", LoopOptions(steps=12, rate=2e-3, save_every=4)),
    ("whole", LoopOptions(steps=30, rate=1e-2, save_every=6)),
)


def healed(work: Path, stages: Any = STAGES, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    made = copy.deepcopy(converted("llama", 16, 16, **SUBSET))
    made.set_attn_implementation("sdpa")
    options = {"data": "these", "batch": 3, "stages": stages, **options}
    return made, heal(made, teacher(), WINDOWS[:30], WINDOWS[30:], work, **options)


def test_healing_brings_it_nearer_and_leaves_the_teacher(tmp_path: Path) -> None:
    before = {n: w.clone() for n, w in teacher().model.state_dict().items()}
    made, history = healed(tmp_path, rank=4, alpha=8.0)
    start = objective(student(), "whole").check(WINDOWS[30:])
    rows = {stage: [r for r in history if r["stage"] == stage] for stage in ("layers", "whole")}
    assert rows["layers"][-1]["loss"] < 0.9 * rows["layers"][0]["loss"]
    assert history[-1]["kl"] < 0.85 * start["kl"]
    assert made.config.kv_latent["trained_tokens"] == 42 * 3 * 24
    assert all(torch.equal(w, before[n]) for n, w in teacher().model.state_dict().items())
    draw(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    ours = flat(made)  # nothing of training is left in it
    assert ours.shape.layers[0].key_dim == 16


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, history = healed(tmp_path / "a")

    class StopError(Exception):
        pass

    steps = iter(range(18))

    def stop() -> None:
        if next(steps) == 17:
            raise StopError

    with pytest.raises(StopError):
        healed(tmp_path / "b", on_step=stop)
    again, told = healed(tmp_path / "b")
    assert told == history
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_the_teaching_that_heals() -> None:
    """On windows learnt by heart; with a negative control that is taught other places' states."""
    nearer = []
    for wrong in (False, True):
        made = student()
        told = LatentObjective(made, teacher(), WINDOWS[:6], "whole", batch=6)
        start = told.check(WINDOWS[:6])["kl"]
        honest = told._states
        if wrong:
            told._states = lambda ids, taps, honest=honest: honest(ids.flip(1), taps)
        machine = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 1e-2)
        for step in range(40):
            made.zero_grad()
            told.gradients(step)
            machine.step()
        told._states = honest
        nearer.append(told.check(WINDOWS[:6])["kl"] / start)
    assert nearer[0] < 0.5
    assert nearer[0] < 0.6 * nearer[1]


def test_a_teacher_of_other_sizes_is_refused(tmp_path: Path) -> None:
    made = copy.deepcopy(converted("llama", 16, 16, **SUBSET))
    other = pair("llama", num_hidden_layers=2)[0]
    with pytest.raises(ConfigError, match="other sizes"):
        heal(made, other, WINDOWS, WINDOWS, tmp_path, data="x", stages=STAGES)

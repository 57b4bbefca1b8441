"""Training a drafter: its gradients, its data, and going on after a stop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, cross_entropy

from narrows.draft.specformer import SpecFormer, SpecFormerConfig
from narrows.errors import ConfigError, InputError, NumericalError
from narrows.train.examples import Example
from narrows.train.linear_start import RIDGE, start_linear
from narrows.train.loop import CHECKPOINT, HISTORY, LoopOptions, rate_at, train
from narrows.train.prompts import (
    BENCHMARK,
    SOURCES,
    answers_from_file,
    from_data,
    from_file,
    long_from_data,
)
from narrows.train.specformer import SpecFormerObjective, common_tokens, new_module
from tiny import pair, prompts


def module(**changes: object) -> SpecFormer:
    config = SpecFormerConfig.of(pair("llama")[0], **{"slots": 3, **changes})
    torch.manual_seed(3)  # after making the target, which sets its own
    return SpecFormer(config)


def examples(count: int = 6) -> list[Example]:
    """Texts that repeat themselves, so that there is something to learn."""
    return [Example((p * 30)[:30], 6) for p in prompts(count, longest=7, seed=4)]


def objective(made: SpecFormer, **options: float) -> SpecFormerObjective:
    return SpecFormerObjective(made, pair("llama")[0], examples(), **options)


EXTENDED = {"anchor": True, "markov": 8, "draft_vocab": 40}


@pytest.mark.parametrize(("distill", "decay"), [(0.0, 1.0), (0.5, 1.0), (0.5, 0.6)])
@pytest.mark.parametrize("changes", [{}, EXTENDED])
def test_gradients_are_those_of_the_summed_loss(changes, distill, decay, monkeypatch):
    """Slot by slot, few rows at a time, gives what one graph of everything gives (T9)."""
    monkeypatch.setattr("narrows.train.specformer.ROWS", 17)
    made = module(**changes)
    goal = objective(made, tokens=120, distill=distill, slot_decay=decay)
    told = goal.gradients(0)
    mine = {n: p.grad.clone() for n, p in made.named_parameters()}
    made.zero_grad()
    drafts = goal.drafts(goal.chosen(0))
    flat = pair("llama")[0]
    slots = made.slots(drafts.states, flat.embed(drafts.tokens[:, 0]))
    rows, places = (drafts.labels >= 0).nonzero(as_tuple=True)
    scores = goal.scores(slots[rows, places], drafts.tokens[rows, places])
    taught = (drafts.coming[rows + places] @ goal.head.T).softmax(-1)
    labels = drafts.labels[rows, places]
    loss = (1 - distill) * cross_entropy(scores, labels, reduction="none")
    loss = loss + distill * cross_entropy(scores, taught, reduction="none")
    weights = decay ** places.float()
    (loss @ weights / weights.sum()).backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-3, atol=1e-5)
    assert told["tokens"] == len(drafts.states)


def test_a_slot_learns_the_token_two_and_more_ahead():
    made = module(draft_vocab=50)
    made.vocabulary = torch.arange(20, 70, dtype=torch.int32)
    goal = objective(made, tokens=30)
    (example,) = goal.chosen(0)
    drafts = goal.drafts([example])
    assert len(drafts.states) == len(example.tokens) - 2 - (example.start - 1)
    flat = pair("llama")[0]
    for row, found in enumerate(drafts.labels.tolist()):
        t = example.start - 1 + row
        expected = [*example.tokens, *[-1] * 5][t + 1 : t + 5]
        assert drafts.tokens[row].tolist() == [max(0, e) for e in expected]
        assert found == [e - 20 if 20 <= e < 70 else -1 for e in expected[1:]]
        for slot, token in enumerate(expected[1:]):
            if token >= 0:  # the tiny model's texts are not its own, so its choice may differ
                state = goal.taps(example)[t + 1 + slot, -1]
                assert torch.equal(drafts.coming[row + slot], state)
    assert flat.head.shape[0] > len(goal.head) == 50


def test_common_tokens_come_first_and_low_ids_fill_up():
    answers = [Example([1, 2, 9, 9, 8], 2), Example([7, 9, 8, 5], 1)]
    assert common_tokens(answers, 2, 12).tolist() == [8, 9]
    assert common_tokens(answers, 6, 12).tolist() == [0, 1, 2, 5, 8, 9]


@pytest.mark.parametrize("changes", [{}, EXTENDED])
def test_a_linear_start_is_the_best_linear_forecast(changes):
    """Where the bottleneck loses nothing, it forecasts as an unhindered regression does, and
    better than random weights."""
    flat = pair("llama")[0]
    made = module(**{**changes, "slots": 1})
    goal = objective(made)
    random_kappa = goal.check(goal.examples)["kappa"]
    features, coming = [], []
    for example in goal.examples:
        taps, start = goal.taps(example), example.start
        read = made.fuse_norm(taps[start - 1 : -1]).flatten(1)
        if changes:
            newest = flat.embed(torch.tensor(example.tokens[start:]))
            read = torch.cat([read, made.token_norm(newest)], 1)
        features.append(read)
        coming.append(taps[start:, -1])
    start_linear(made, flat, goal.read(99))
    assert goal.check(goal.examples)["kappa"] > random_kappa
    z, y = torch.cat(features), torch.cat(coming)
    ridge = RIDGE * torch.diag(z.square().sum(0))
    best = z @ torch.linalg.solve(z.T @ z + ridge, z.T @ y)
    drafts = goal.drafts(goal.examples)
    slots = made.slots(drafts.states, flat.embed(drafts.tokens[:, 0]))[:, 0]
    ends = torch.tensor([len(e.tokens) - e.start for e in goal.examples]).cumsum(0) - 1
    inner = torch.tensor([i for i in range(len(best)) if i not in ends.tolist()])
    gains = flat.final_norm(torch.ones(1, 48))[0]
    likeness = cosine_similarity(slots * gains, best[inner])
    assert likeness.min() > 0.9


def test_modules_that_cannot_be_are_refused():
    flat = pair("llama")[0]
    for changes, told in (
        ({"taps": (0, 2)}, "last tapped"),
        ({"taps": (-1, 3)}, "rising order"),
        ({"draft_attention": "none"}, "draft_attention"),
        ({"draft_vocab": 500}, "draft_vocab"),
    ):
        with pytest.raises(ConfigError, match=told):
            new_module(flat, examples(), **changes)


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


WORKER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from test_specformer_training import module, objective
from narrows.train.loop import LoopOptions, train
made = module()
goal = objective(made, tokens=60)
out = Path(sys.argv[1])
history = train(made, goal.gradients, out, LoopOptions(steps=5, save_every=5), data="x")
name = sys.argv[2]
save_file({k: v.detach() for k, v in made.named_parameters()}, out / f"{name}.safetensors")
print(history[-1]["loss"])
"""


def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parent), str(here.parents[2])])
    workers = []
    for rank in range(2):
        crew = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        crew |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
        environment = os.environ | {k: str(v) for k, v in crew.items()}
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(rank)]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    losses = [float(w.communicate(timeout=300)[0]) for w in workers]
    assert [w.returncode for w in workers] == [0, 0]
    assert losses[0] == losses[1]
    made = module()
    goal = objective(made, tokens=120)
    history = train(made, goal.gradients, tmp_path / "one", LoopOptions(steps=5), data="x")
    assert losses[0] == pytest.approx(history[-1]["loss"], rel=1e-4)
    for rank in ("0", "1"):
        theirs = load_file(tmp_path / f"{rank}.safetensors")
        for name, p in made.named_parameters():
            torch.testing.assert_close(theirs[name], p.detach(), rtol=1e-3, atol=1e-4)
    assert (tmp_path / CHECKPOINT).exists()
    assert len((tmp_path / HISTORY).read_text().splitlines()) == 5


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
    with pytest.raises(InputError, match="No space"):
        run(tmp_path, steps=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, HISTORY]
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_the_rate_rises_and_falls():
    options = LoopOptions(steps=100, rate=1.0)
    rates = [rate_at(options, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[5] == pytest.approx(1.0)
    assert rates == [*sorted(rates[:5]), *sorted(rates[5:], reverse=True)]
    assert rates[-1] == pytest.approx(0.02, abs=2e-3)


def test_long_prompts_are_long_and_ask_about_one_of_their_texts(tmp_path):
    path = tmp_path / "wiki_passages/passages.jsonl"
    path.parent.mkdir()
    rows = [{"title": f"Town {i}", "text": f"Town {i} lies by the sea. " * 5} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = long_from_data(tmp_path, 5, 700, seed=1)
    assert len(made) == len(set(made)) == 5
    for prompt in made:
        assert 700 <= len(prompt) < 1200
        asked = prompt.rpartition("about ")[2].rstrip(".")
        assert f"{asked}\n" in prompt
    assert made == long_from_data(tmp_path, 5, 700, seed=1)


def test_what_drafting_is_measured_on_is_not_learnt(tmp_path):
    def write(name, *rows):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    row = {"instruction": "Sing.", "title": "Bonn", "text": "A city.", "context": "C"}
    row |= {"choices": ["A", "B"], "prompt": "def f():"}
    for name in {name for name, _ in SOURCES}:
        write(name, {**row, "question": f"what is {name}", "gold_text": "G"})
    asked = {**row, "question": "who built the bridge", "gold_text": "Some did."}
    for name in ("gsm8k/train", "lost_in_the_middle/nq_open_oracle"):
        write(name, asked, {**asked, "question": f"what is {name}"})
    write(BENCHMARK, {"turns": ["Who built the bridge?", "Why?"]})
    prompts = from_data(tmp_path, 13)
    assert not any("bridge" in prompt for prompt in prompts)
    with pytest.raises(InputError, match="only 13 prompts"):
        from_data(tmp_path, 14)


def test_prompts(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b", "id": 3}\n')
    assert from_file(path) == ["a", "b"]
    path.write_text('{"prompt": "a"}\n{"prompt": "  "}\n')
    with pytest.raises(InputError, match="row 2"):
        from_file(path)
    path.write_text('{"prompt": "a", "answer": "x"}\n{"prompt": "b", "output": "y"}\n')
    assert answers_from_file(path) == ["x", "y"]
    path.write_text('{"prompt": "a", "answer": "x"}\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match="row 2: no answer"):
        answers_from_file(path)
    with pytest.raises(InputError, match="has no"):
        from_data(tmp_path, 3)

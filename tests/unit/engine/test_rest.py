"""Drafting rests where thinking of it costs something and nothing is verified, and now and then to
see what a step without it takes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from narrows.draft.length import DraftLength, Plan
from narrows.engine import speculation
from narrows.engine.speculation import LONGEST_REST, PLAIN_EVERY, Speculation
from tiny_drafts import offer


class Asked:
    """A drafter that notes in which steps it was asked."""

    name, most = "asked", 4

    def __init__(self) -> None:
        self.step, self.steps = 0, []

    def offer(self, asked):
        self.steps.append(self.step)
        return [[offer("asked", 1)] for _ in asked]

    def propose(self, asked):
        return [SimpleNamespace(tokens=[7], probabilities=None, chances=()) for _ in asked]


def steps_asked(
    monkeypatch, thought: float, worth, steps: int = 50, gain: float = 0, beside=lambda step: 1
) -> list[int]:
    """Of so many steps that take a second, where a thought takes so many, for as many sequences as
    are ``beside`` each other; in those in ``worth`` guesses are worth verifying, and promise to
    gain so much."""
    drafter = Asked()
    made = Speculation(drafter)  # type: ignore[arg-type]
    for _ in range(20):
        made.observe(1, 1.0)
    clock, lasting = itertools.count(step=thought), made.length.steps
    monkeypatch.setattr(speculation.time, "perf_counter", lambda: next(clock))

    def choose(asked, rows, decoding):
        k = int(drafter.step in worth)
        taken = [some[0] if k else None for _, some in asked]
        return Plan(taken, [k for _ in asked], speed=(1 + k * gain) * decoding / lasting(decoding))

    monkeypatch.setattr(made.length, "choose", choose)
    sequence = SimpleNamespace(number=0, tokens=[1, 2, 3], sealed=True, pending=1, limit=100)
    for drafter.step in range(steps):
        work = [SimpleNamespace(sequence=sequence, count=1)] * beside(drafter.step)
        drafts = made.drafts(work)  # type: ignore[arg-type]
        assert len(drafts[0].tokens) == (drafter.step in worth and drafter.step in drafter.steps)
    return drafter.steps


def test_it_rests_longer_each_time_up_to_a_bound(monkeypatch):
    asked = steps_asked(monkeypatch, 0.1, worth=())
    gaps = [b - a - 1 for a, b in itertools.pairwise(asked)]
    assert gaps == [1, 2, 4, 8, LONGEST_REST, *gaps[5:]]
    assert set(gaps[5:]) <= {LONGEST_REST}


def test_what_is_worth_it_ends_the_rest(monkeypatch):
    assert steps_asked(monkeypatch, 0.1, worth=range(50)) == list(range(50))
    asked = steps_asked(monkeypatch, 0.1, worth=(5, 6, 7))
    assert asked[:6] == [0, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("worth", [(), range(3)])
def test_what_costs_nothing_is_thought_of_always(monkeypatch, worth):
    assert steps_asked(monkeypatch, 0.001, worth) == list(range(50))


def test_it_rests_only_where_thinking_costs_more_than_it_finds(monkeypatch):
    """Every third step has something, which half of the thoughts behind an idle one so find."""
    worth = range(0, 600, 3)
    assert len(steps_asked(monkeypatch, 0.05, worth, 600, gain=0.5)) == 600
    assert len(steps_asked(monkeypatch, 0.05, worth, 600, gain=0.05)) < 500


def test_what_is_found_beside_few_sequences_is_not_expected_of_many(monkeypatch):
    few, many = range(3), range(3, 20)
    asked = steps_asked(
        monkeypatch,
        thought=0.05,
        worth=[step for step in range(1200) if step % 20 in few],
        steps=1200,
        gain=2.0,
        beside=lambda step: 1 if step % 20 in few else 16,
    )
    late = [step % 20 for step in asked if step >= 800]
    assert any(step in few for step in late)
    assert sum(step in many for step in late) < 20 * len(many) / 2


def steps_with_guesses(sequences: int, k: int, steps: int) -> list[bool]:
    """Whether each of so many steps of ``sequences`` verified guesses, ``k`` for each of them if it
    does."""
    made = Speculation(Asked())  # type: ignore[arg-type]
    made.length.choose = lambda asked, rows, decoding: Plan(  # type: ignore[method-assign]
        [some[0] for _, some in asked], [k for _ in asked]
    )
    sequence = SimpleNamespace(number=0, tokens=[1, 2, 3], sealed=True, pending=1, limit=100)
    work = [SimpleNamespace(sequence=sequence, count=1)] * sequences
    drafted = []
    for _ in range(steps):
        drafts = made.drafts(work)  # type: ignore[arg-type]
        drafted.append(any(draft.tokens for draft in drafts))
        made.observe(sequences + (k * sequences if drafted[-1] else 0), 1.0)
    return drafted


def test_steps_without_guesses_come_more_and_more_seldom_up_to_a_bound():
    drafted = steps_with_guesses(8, 1, 6 * PLAIN_EVERY)
    plain = [i for i, guessed in enumerate(drafted) if not guessed]
    gaps = [b - a - 1 for a, b in itertools.pairwise([-1, *plain])]
    assert gaps[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert set(gaps[7:]) == {PLAIN_EVERY}


def test_steps_of_hardly_more_rows_tell_as_much():
    assert all(steps_with_guesses(1, 3, 2 * PLAIN_EVERY))


def test_a_fixed_draft_length_is_kept_to():
    made = Speculation(Asked(), fixed=1)  # type: ignore[arg-type]
    sequence = SimpleNamespace(number=0, tokens=[1, 2, 3], sealed=True, pending=1, limit=100)
    work = [SimpleNamespace(sequence=sequence, count=1)] * 8
    for _ in range(8):
        assert all(d.tokens for d in made.drafts(work))  # type: ignore[arg-type]
        made.observe(16, 1.0)


def test_steps_that_read_prompts_tell_nothing_of_those_that_only_decode():
    made = Speculation(Asked())  # type: ignore[arg-type]
    sequence = SimpleNamespace(number=0, tokens=[1, 2, 3], sealed=True, pending=1, limit=100)
    decoding = [SimpleNamespace(sequence=sequence, count=1)] * 4
    reader = SimpleNamespace(number=1, tokens=[1] * 300, sealed=False, pending=300, limit=400)
    verified = []
    for _ in range(40):
        for work in (decoding, [*decoding, SimpleNamespace(sequence=reader, count=200)]):
            drafts = made.drafts(work)  # type: ignore[arg-type]
            rows = sum(item.count for item in work) + sum(len(d.tokens) for d in drafts)
            verified.append(any(d.tokens for d in drafts))
            for item, draft in zip(work[:4], drafts, strict=False):
                made.learn(item.sequence, draft, len(draft.tokens))
            made.observe(rows, 1.0 + rows / (1 if work is not decoding else 100))
    assert made.length.steps(4, 4) == pytest.approx(1.04, rel=0.05)
    assert any(verified[20::2])
    assert not any(verified[21::2])


@pytest.mark.parametrize(("true", "lasting"), [(1.0, True), (0.8, False)])
def test_promises_that_are_not_kept_are_believed_less(true, lasting):
    """Guesses promise a fifth more than none give; they keep it, or nothing of it comes true."""
    length = DraftLength()
    for rows in (8, 12, 16, 20) * 20:
        length.steps.observe(rows, 1.0 + 0.02 * rows)
    good = offer("x", 1, 0.4)
    drafted = []
    for _ in range(200):
        plan = length.choose([(i, [good]) for i in range(8)], 8, 8)
        drafted.append(any(plan.lengths))
        length.came(plan, true * plan.speed)
    assert drafted[0]
    assert drafted[-1] is lasting
    assert length.kept == pytest.approx(1.0) if lasting else length.kept < 1

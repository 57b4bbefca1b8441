"""Verification keeps the law of what is written: exactly for chosen guesses, in distribution for
drawn ones, with a rule that does not as a control."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter

import pytest
import torch
from torch import Tensor

from narrows.config import SamplingParams
from narrows.contracts import Draft
from narrows.engine import verify as verify_module
from narrows.engine.sampling import Sampler
from narrows.engine.verify import settle, verify, verify_batch
from tiny_scores import Given

V = 5


def sampler(**values: object) -> Sampler:
    return Sampler(SamplingParams(**values), V, frozenset(), [])


def distribution(*shape: int, seed: int = 0, zeros: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(*shape, V, generator=g, dtype=torch.float64)
    if zeros:
        p *= torch.rand(*shape, V, generator=g, dtype=torch.float64) > 0.5
        p[..., 0] += 0.1
    return p / p.sum(-1, keepdim=True)


class Loaded:
    """A sampler whose uniform number is given, and whose draws are recorded."""

    def __init__(self, number: float) -> None:
        self.number = number
        self.drawn_from: Tensor | None = None

    def uniform(self) -> float:
        return self.number

    def draw(self, probabilities: Tensor) -> int:
        self.drawn_from = probabilities
        return -1


@pytest.mark.parametrize("seed", range(20))
def test_accepting_and_replacing_add_up_to_the_target(seed: int) -> None:
    """The law of the outcome, integrated over the uniform number and the guess."""
    p = distribution(seed=seed, zeros=seed % 3 == 0)
    q = p if seed % 5 == 4 else distribution(seed=seed + 100, zeros=seed % 2 == 0)
    draft = Draft([0], q[None])
    law = torch.zeros(V, dtype=torch.float64)
    for guess in range(V):
        if q[guess] == 0:
            continue
        stay = min(1.0, float(p[guess] / q[guess]))
        # The rule's own threshold is where it changes its mind.
        for number, kept in ((stay * (1 - 1e-9), True), (stay * (1 + 1e-9) + 1e-12, False)):
            if number >= 1 or (kept and stay == 0):
                continue
            machine = Loaded(number)
            outcome = settle(machine, p, guess, draft, 0)  # type: ignore[arg-type]
            assert (outcome == guess) == kept
            if not kept:
                assert machine.drawn_from is not None
                rest = machine.drawn_from / machine.drawn_from.sum()
                law += q[guess] * (1 - stay) * rest
        law[guess] += q[guess] * stay
    torch.testing.assert_close(law, p, rtol=1e-12, atol=1e-12)


LENGTH = 3
RUNS = int(os.environ.get("NARROWS_LAW_RUNS", "4000"))
"""Texts written to compare their law; more find smaller faults."""


def target_rows(prefix: tuple[int, ...], guesses: list[int], seed: int) -> Tensor:
    """Scores after the prefix and after each guess, a table of random numbers."""
    rows = []
    said = list(prefix)
    for guess in [*guesses, None]:
        rows.append(torch.randn(V, generator=torch.Generator().manual_seed(hash((seed, *said)))))
        if guess is not None:
            said.append(guess)
    return torch.stack(rows)


def write(one: Sampler, q: Tensor, chance: torch.Generator, k: int, drawn: bool) -> tuple[int, ...]:
    """The first LENGTH tokens, written with drafts of ``k`` tokens."""
    said: list[int] = []
    while len(said) < LENGTH:
        if drawn:
            rows = q[:k]
            guesses = torch.multinomial(rows, 1, generator=chance)[:, 0].tolist()
            draft = Draft(guesses, rows)
        else:
            draft = Draft(q[:k].argmax(1).tolist())
        logits = target_rows(tuple(said), draft.tokens, 7)
        said += [token for token, _ in verify(one, logits, said, draft)]
    return tuple(said[:LENGTH])


def law(one: Sampler) -> dict[tuple[int, ...], float]:
    exact = {}
    for text in itertools.product(range(V), repeat=LENGTH):
        chance = 1.0
        for place, token in enumerate(text):
            scores = target_rows(text[:place], [], 7)[0]
            chance *= float(one.probabilities(one.process(scores, text[:place]))[token])
        exact[text] = chance
    return exact


def g_test(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """Upper bound of the chance of counts at least this far from ``exact``, by the normal
    approximation of Wilson and Hilferty; cells of expectation below 5 are pooled."""
    total = sum(counts.values())
    cells, rest_seen, rest = [], 0, 0.0
    for text, chance in exact.items():
        if chance * total >= 5:
            cells.append((counts[text], chance * total))
        else:
            rest_seen, rest = rest_seen + counts[text], rest + chance * total
    assert not rest_seen or rest > 0, "something impossible was written"
    if rest >= 5:
        cells.append((rest_seen, rest))
    g = 2 * sum(seen * math.log(seen / due) for seen, due in cells if seen)
    degrees = len(cells) - 1
    z = ((g / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("drawn", [True, False])
def test_what_is_written_has_the_target_s_law(settings: dict, k: int, drawn: bool) -> None:
    one = sampler(seed=3, **settings)
    chance, q = torch.Generator().manual_seed(1), distribution(3, seed=2)
    counts = Counter(write(one, q, chance, k, drawn) for _ in range(RUNS))
    assert g_test(counts, law(one)) > 1e-4


def test_the_test_of_the_law_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that keeps drawn guesses half again too often."""

    def biased(one: Sampler, target: Tensor, guess: int, draft: Draft, place: int) -> int:
        assert draft.probabilities is not None
        drawn_from = draft.probabilities[place]
        if one.uniform() * float(drawn_from[guess]) < 1.5 * float(target[guess]):
            return guess
        return one.draw((target - drawn_from).clamp(min=0.0) + 1e-12)

    monkeypatch.setattr(verify_module, "settle", biased)
    one = sampler(seed=3, temperature=1.0)
    chance, q = torch.Generator().manual_seed(1), distribution(3, seed=2)
    counts = Counter(write(one, q, chance, 3, True) for _ in range(RUNS))
    assert g_test(counts, law(one)) < 1e-4


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.9},
        {"repetition_penalty": 1.4},
        {"frequency_penalty": 0.5},
        {"min_tokens": 2, "stop_token_ids": (1,)},
        {"logprobs": 2, "temperature": 0.6},
    ],
)
def test_chosen_guesses_change_no_token_and_no_random_number(values: dict) -> None:
    for trial in range(60):
        plain, ahead = sampler(seed=trial, **values), sampler(seed=trial, **values)
        g = torch.Generator().manual_seed(trial)
        said: list[int] = []
        while len(said) < 6:
            guesses = torch.randint(V, (trial % 4,), generator=g).tolist()
            if trial % 2:  # half the time the first guess is the right one
                state = ahead.state()
                guesses[:1] = [ahead.sample(target_rows(tuple(said), [], 3)[0], said)[0]][
                    : len(guesses)
                ]
                ahead.restore(state)
            rows = target_rows(tuple(said), guesses, 3)
            drafts = [Draft(guesses)]
            (committed,) = verify_batch([ahead], Given(rows), [said], drafts)
            for sampled in committed:
                assert sampled == plain.sample(target_rows(tuple(said), [], 3)[0], said)
                said.append(sampled[0])
        assert torch.equal(plain.state(), ahead.state())


def test_logits_are_wanted_only_where_the_best_do_not_tell() -> None:
    drafts = [Draft([]), Draft([1, 2])]
    for settings, asked in (({}, 0), ({"temperature": 1.0}, 1), ({"logprobs": 1}, 1)):
        scores = Given(torch.randn(4, V))
        verify_batch([sampler(), sampler(**settings)], scores, [[], [1]], drafts)
        assert scores.asked == asked


def test_a_batch_is_its_rows_one_by_one() -> None:
    drafts = [Draft([]), Draft([1, 2]), Draft([3], distribution(1)), Draft([0, 0, 0])]
    rows = torch.randn(sum(len(d.tokens) + 1 for d in drafts), V)
    kinds = [{}, {}, {"temperature": 1.0, "seed": 4}, {"presence_penalty": 1.0}]
    many, alone = ([sampler(**k) for k in kinds] for _ in range(2))
    got = verify_batch(many, Given(rows), [[1]] * 4, drafts)
    start = 0
    for one, draft, committed in zip(alone, drafts, got, strict=True):
        stop = start + len(draft.tokens) + 1
        assert committed == verify(one, rows[start:stop], [1], draft)
        start = stop

"""Phrases against plain counting, on disk, and as a drafter."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.contracts import Asked
from narrows.draft import phrases as module
from narrows.draft.phrases import FILE, LONGEST, PhraseDrafter, Phrases
from narrows.draft.specs import make_drafter
from narrows.errors import ConfigError, InputError, ModelError
from narrows.ops.ngrams import longer_key
from narrows.train.examples import Example
from narrows.train.phrases import HELD_OUT, OFTEN, count_phrases

FINGERPRINT = "0123456789abcdef"


def key_of(run: tuple[int, ...]) -> int:
    key = 0
    for token in reversed(run):
        key = longer_key(key, token)
    return key


def counted(examples: list[Example]) -> dict[tuple[int, ...], Counter[int]]:
    """What followed each run of one to LONGEST tokens in the answers, and how often."""
    behind: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for example in examples:
        for i in range(max(example.start, LONGEST), len(example.tokens)):
            for size in range(1, LONGEST + 1):
                behind[tuple(example.tokens[i - size : i])][example.tokens[i]] += 1
    return {run: some for run, some in behind.items() if sum(some.values()) >= OFTEN}


def likeliest(some: Counter[int]) -> int:
    return min(some, key=lambda token: (-some[token], token))


answers = st.lists(
    st.lists(st.integers(0, 2), min_size=5, max_size=30).map(lambda t: Example(t, len(t) // 3)),
    min_size=2,
    max_size=25,
)


@given(answers)
def test_phrases_are_what_plain_counting_finds(examples):
    found, _ = count_phrases(examples, FINGERPRINT)
    expected = {key_of(run): likeliest(some) for run, some in counted(examples).items()}
    assert dict(zip(found.keys.tolist(), found.tokens.tolist(), strict=True)) == expected
    assert found.keys.tolist() == sorted(expected)


@given(answers)
def test_chances_are_of_answers_held_out(examples):
    found, told = count_phrases(examples, FINGERPRINT)
    held = max(1, round(HELD_OUT * len(examples)))
    behind = counted(examples[:-held])
    places = known = right = 0
    for example in examples[-held:]:
        for i in range(max(example.start, LONGEST), len(example.tokens)):
            runs = [tuple(example.tokens[i - size : i]) for size in range(LONGEST, 0, -1)]
            run = next((run for run in runs if run in behind), None)
            places += 1
            known += run is not None
            right += run is not None and likeliest(behind[run]) == example.tokens[i]
    assert told == (places, known, right)
    assert ((found.chances > 0) & (found.chances < 1)).all()


def test_what_has_been_right_on_held_out_answers_is_likelier():
    sure = [1, 2, 3, 4, 5, 6, 7, 8]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(10, 13, (200, 8), generator=generator).tolist()
    found, _ = count_phrases([Example([*sure, *other], 0) for other in drawn], FINGERPRINT)
    of = found.chances[found.sorts.long()]
    chance = dict(zip(found.keys.tolist(), of.tolist(), strict=True))
    assert chance[key_of((4, 5, 6, 7))] > 0.9
    doubtful = [chance[key_of(run)] for run in counted([Example(other, 0) for other in drawn])]
    assert doubtful
    assert max(doubtful) < 0.8


def test_too_few_answers_to_count():
    with pytest.raises(InputError, match="too few"):
        count_phrases([Example([1, 2, 3, 4, 5], 1)], FINGERPRINT)


def table(runs: dict[tuple[int, ...], tuple[int, float]]) -> Phrases:
    rows = sorted((key_of(run), token, chance) for run, (token, chance) in runs.items())
    keys, tokens, chances = zip(*rows, strict=True)
    return Phrases(
        FINGERPRINT,
        torch.tensor(keys),
        torch.tensor(tokens, dtype=torch.int32),
        torch.arange(len(rows), dtype=torch.uint8),
        torch.tensor(chances),
    )


KNOWN = table(
    {
        (1,): (2, 0.5),
        (2,): (3, 0.6),
        (1, 2): (4, 0.9),
        (3, 1, 2): (5, 0.8),
        (4,): (6, 0.1),
        (6, 2): (9, 0.9),
    }
)


def drafted(tokens: list[int], k: int, **options) -> tuple[list[int], list[float]]:
    drafter = PhraseDrafter(KNOWN, **options)
    (offers,) = drafter.offer([Asked(0, tokens, k)])
    (made,) = [list(one.tokens) for one in offers] or [[]]
    assert sum(offer.k for offer in offers) == len(made)
    chances = [round(sort.expected, 3) for offer in offers for sort in offer.sorts]
    return made, chances


def test_the_longest_run_that_is_known_decides_and_guesses_go_on():
    assert drafted([7, 1], 4) == ([2, 4], [0.5, 0.9])  # what may follow 4 is too unlikely
    assert drafted([3, 1], 4) == ([2, 5], [0.5, 0.8])
    assert drafted([3, 1], 1) == ([2], [0.5])
    assert drafted([3, 1], 4, most=1) == ([2], [0.5])
    assert drafted([7, 2], 4) == ([3], [0.6])
    assert drafted([8], 4) == drafted([], 4) == ([], [])


def test_a_longer_run_is_not_looked_for_where_its_end_is_not_known():
    assert drafted([6, 2], 1) == ([9], [0.9])
    assert drafted([2, 6, 4], 1) == ([], [])


def test_on_disk(tmp_path):
    KNOWN.save(tmp_path)
    found = Phrases.load(tmp_path)
    assert found.fingerprint == FINGERPRINT
    for name in module.TENSORS:
        assert torch.equal(getattr(found, name), getattr(KNOWN, name))


def target(fingerprint: str = FINGERPRINT, vocabulary: int = 10) -> SimpleNamespace:
    return SimpleNamespace(
        fingerprint=fingerprint, name="tiny", shape=SimpleNamespace(vocab_size=vocabulary)
    )


def test_a_drafter_by_its_folder(tmp_path):
    KNOWN.save(tmp_path)
    made = make_drafter(f"phrases:folder={tmp_path},most=2", target())
    assert (made.name, made.most) == ("phrases", 2)
    with pytest.raises(ConfigError, match="are another model's"):
        make_drafter(f"phrases:folder={tmp_path}", target("f" * 16))
    with pytest.raises(ModelError, match="outside the vocabulary"):
        make_drafter(f"phrases:folder={tmp_path}", target(vocabulary=9))
    with pytest.raises(ConfigError, match="no phrases are shipped for tiny"):
        make_drafter("phrases", target())
    with pytest.raises(ModelError, match="cannot read phrases"):
        make_drafter(f"phrases:folder={tmp_path / 'none'}", target())


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: replace(p, keys=p.keys.flip(0)),
        lambda p: replace(p, keys=p.keys.int()),
        lambda p: replace(p, tokens=p.tokens[1:]),
        lambda p: replace(p, tokens=-p.tokens),
        lambda p: replace(p, chances=p.chances[:2]),
    ],
    ids=["order", "type", "length", "tokens", "sorts"],
)
def test_what_does_not_hold_phrases_is_refused(tmp_path, damage):
    damage(KNOWN).save(tmp_path)
    with pytest.raises(ModelError, match="does not hold phrases"):
        Phrases.load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    KNOWN.save(tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cannot read phrases"):
        Phrases.load(tmp_path)

"""N-gram searches by the kernel against their definitions."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.ops.native import library
from narrows.ops.ngrams import Runs, longer_key, repeats, repeats_plain

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

texts = st.one_of(
    st.lists(st.integers(0, 3), max_size=90),
    st.lists(st.integers(0, 40), max_size=400),
    st.lists(st.sampled_from([0, 1, 255, 256, 65536, 2**31 - 1]), max_size=90),
)


@given(
    st.lists(st.tuples(texts, st.integers(0, 80)), max_size=4),
    st.tuples(st.integers(1, 4), st.integers(0, 4)),
    st.integers(0, 12),
)
def test_repeats_are_those_of_the_definition(drawn, lengths, most):
    shortest, longer = lengths
    some = [array("i", tokens + tokens[:again]) for tokens, again in drawn]
    sizes = (shortest, shortest + longer, 32, most)
    assert repeats(some, *sizes) == [repeats_plain(text, *sizes) for text in some]


def test_a_repeat_far_back_is_found_behind_many_that_only_end_alike():
    text = array("i", [7, 8, 9, 1, *[9, 2, 9, 3] * 200, 7, 8, 9])
    ((size, behind, went),) = repeats([text], 2, 4, 32, 3)
    assert (size, behind, list(went)) == (3, 3, [0, 0, 0])


def runs(seed: int, count: int, vocabulary: int) -> Runs:
    """Random runs of one to four tokens, all their ends among them."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, (count, 4), generator=g).tolist()
    keys = set()
    for run in drawn:
        key = 0
        for token in run[: 1 + len(keys) % 4]:
            key = longer_key(key, token)
            keys.add(key)
    n = len(keys)
    return Runs(
        torch.tensor(sorted(keys), dtype=torch.int64),
        torch.randint(0, vocabulary, (n,), generator=g, dtype=torch.int32),
        torch.randint(0, 5, (n,), generator=g, dtype=torch.uint8),
        torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]),
    )


@given(
    st.integers(0, 10**6),
    st.integers(0, 300),
    st.sampled_from([2, 5, 2000]),
    st.lists(st.lists(st.integers(0, 1999), max_size=6), max_size=4),
    st.tuples(st.integers(1, 5), st.integers(0, 8)),
    st.sampled_from([0.0, 0.2, 0.5]),
)
def test_guesses_are_those_of_the_definition(seed, count, vocabulary, drawn, sizes, least):
    table = runs(seed, count, vocabulary)
    some = [[token % vocabulary for token in tokens] for tokens in drawn]
    expected = [table.behind_plain(text, *sizes, least) for text in some]
    assert table.behind(some, *sizes, least) == expected

import re

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

import tiny_tokenizers
from narrows.compression.protect import CLASSES, PRESETS, Protection
from narrows.compression.units import make_units, tokenize
from narrows.errors import ConfigError


def kept(text, protect, granularity="token"):
    """The text of the forced units."""
    tokens = tokenize(text, tiny_tokenizers.make("bytes"))
    units = make_units(tokens, granularity)
    held = np.repeat(Protection(protect).forced(tokens, units), units.costs)
    return "".join(text[a:b] for (a, b), h in zip(tokens.spans, held, strict=True) if h)


def found(name, text):
    """What a class matches in a text."""
    return [match.group() for match in CLASSES[name].finditer(text)]


@pytest.mark.parametrize(
    ("name", "text", "matches"),
    [
        (
            "digits",
            "a -3.5% of 1,000 in A4, ½, ٣ at 10:30",
            ["-3.5%", "1,000", "4", "½", "٣", "10:30"],
        ),
        ("digits", "3-4 and x-2", ["3", "4", "2"]),
        ("newlines", "a\r\n\r\nb\nc\u2028", ["\r\n\r\n", "\n", "\u2028"]),
        ("punct", 'a, "b"。', [",", '"', '"。']),
        ("urls", "see (https://a.no/b?c=1#d), www.x.org.", ["https://a.no/b?c=1#d", "www.x.org"]),
        ("code_fences", "a\n```py\nx\n```\nb", ["```py\nx\n```"]),
        ("code_fences", "a\n~~~\nleft open", ["~~~\nleft open"]),
        ("negations", "Not now; I don’t know, cannot knot 没有", ["Not", "don’t", "cannot", "没"]),
        ("quoted", 'a "b c" it\'s “d” 「e」 "f', ['"b c"', "“d”", "「e」"]),
    ],
)
def test_named_classes(name, text, matches):
    assert found(name, text) == matches


def test_every_form_of_an_item():
    text = "order 66 of Anna Lund costs @home money"
    assert kept(text, "Anna", "word") == " Anna"
    assert kept(text, ["@digits", "Lund"], "word") == " 66 Lund"
    assert kept(text, [re.compile(r"c\w+s")], "word") == " costs"
    assert kept(text, [regex.compile(r"\p{Lu}\w+")], "word") == " Anna Lund"
    assert kept(text, [(6, 8)], "word") == " 66"
    assert kept(text, "@@home") == "@home"
    assert kept(text, []) == ""
    assert kept("", ["@digits", "x", 3]) == ""


def test_token_ids():
    text = "Anna and Anna and Lund"
    tokens = tokenize(text, tiny_tokenizers.make("bytes"))
    held = Protection(tokens.ids[-1]).forced(tokens, make_units(tokens))
    assert held.tolist() == [i == tokens.ids[-1] for i in tokens.ids]


@pytest.mark.parametrize("name", [*CLASSES, *PRESETS])
def test_every_name_is_accepted(name):
    assert Protection(f"@{name}").describe()


@given(tiny_tokenizers.texts, st.data(), st.sampled_from(["token", "word", "phrase", "sentence"]))
def test_random_spans_survive_verbatim(text, data, granularity):
    tokens = tokenize(text, tiny_tokenizers.make("bytes"))
    units = make_units(tokens, granularity)
    place = st.integers(0, len(text))
    spans = data.draw(st.lists(st.tuples(place, place).map(lambda s: tuple(sorted(s))), max_size=4))
    forced = Protection(spans).forced(tokens, units)
    bounds = units.bounds
    inside = set()
    for u in range(len(units)):
        a, b = tokens.spans[bounds[u]][0], tokens.spans[bounds[u + 1] - 1][1]
        touched = any(a < end and start < b and start < end for start, end in spans)
        assert forced[u] == touched  # all that is protected, and nothing else
        inside.update(range(a, b) if forced[u] else ())
    assert all(inside.issuperset(range(*span)) for span in spans)


@given(tiny_tokenizers.texts, st.sampled_from(sorted(CLASSES)))
def test_named_classes_survive_verbatim(text, name):
    tokens = tokenize(text, tiny_tokenizers.make("bytes-trimmed"))
    units = make_units(tokens)
    held = np.repeat(Protection(f"@{name}").forced(tokens, units), units.costs)
    inside = {i for (a, b), h in zip(tokens.spans, held, strict=True) if h for i in range(a, b)}
    for match in CLASSES[name].finditer(text):
        assert inside.issuperset(range(*match.span()))


@pytest.mark.parametrize(
    "bad", [True, -1, 1.5, "", None, (3, 1), (-1, 2), (1, 2, 3), re.compile(b"x"), {"a": 1}]
)
def test_what_is_no_item_is_refused(bad):
    with pytest.raises(ConfigError, match="protect"):
        Protection([bad])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'@digit'.*@digits.*@math.*'@@digit'"):
        Protection("@digit")


def test_a_span_outside_the_text_is_refused():
    with pytest.raises(ConfigError, match="2:9"):
        kept("short", [(2, 9)])


@pytest.mark.parametrize("text", ["“" * 20_000, "```\n" * 5_000, "www." * 10_000, "-" * 50_000])
def test_patterns_do_not_blow_up(text):
    for pattern in CLASSES.values():
        for _ in pattern.finditer(text, timeout=20):
            pass

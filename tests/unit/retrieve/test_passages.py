import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from narrows.contracts import Document
from narrows.errors import ConfigError
from narrows.retrieve.passages import split_passages

PIECES = st.sampled_from(
    [
        "Word ",
        "two. ",
        "\r\n",
        "\n",
        "\n\n",
        "漢字。",
        "👩‍👩‍👧",
        "e\u0301",
        "x" * 30,
        "\t",
        "“Hi!” ",
    ]
)


def words(text):
    return len(regex.findall(r"\S+", text))


@given(st.lists(PIECES).map("".join), st.integers(1, 60), st.sampled_from([len, words]))
def test_passages_partition_the_document_within_the_size(text, size, count):
    passages = split_passages(Document("d", text), size, count)
    assert "".join(p.text for p in passages) == text
    at = 0
    for passage in passages:
        assert passage.span[0] == at < passage.span[1]
        at = passage.span[1]
        assert passage.text == text[slice(*passage.span)]
        assert count(passage.text) <= size or len(regex.findall(r"\X", passage.text)) == 1
    assert at == len(text)


@given(st.lists(PIECES).map("".join), st.integers(1, 40))
def test_no_cut_inside_a_character_the_reader_sees(text, size):
    starts = {m.start() for m in regex.finditer(r"\X", text)}
    assert all(p.span[0] in starts for p in split_passages(Document("d", text), size))


def test_paragraphs_are_kept_whole_and_packed():
    text = "One a.\r\n\r\nTwo b. Two c.\r\n\r\nThree d. Three e. Three f."
    passages = split_passages(Document("d", text), 25)
    assert [p.text for p in passages] == [
        "One a.\r\n\r\n",
        "Two b. Two c.\r\n\r\n",
        "Three d. Three e. ",
        "Three f.",
    ]
    assert split_passages(Document("d", text), 27)[0].text == text[:27]


def test_sentences_before_words():
    text = "It cost 3.5 dollars, i.e. little. Then 12 more came!"
    texts = [p.text for p in split_passages(Document("d", text), 40)]
    assert texts == ["It cost 3.5 dollars, i.e. little. ", "Then 12 more came!"]
    assert [p.text for p in split_passages(Document("d", "一二三。四五六！”七"), 5)] == [
        "一二三。",
        "四五六！”",
        "七",
    ]


def test_a_text_without_gaps_costs_few_counts():
    calls = []

    def count(text):
        calls.append(text)
        return len(text)

    passages = split_passages(Document("d", "x" * 4096), 64, count)
    assert len(passages) == 64
    assert len(calls) < 200


def test_empty_document_and_bad_size():
    assert split_passages(Document("d", ""), 5) == []
    with pytest.raises(ConfigError, match="at least 1"):
        split_passages(Document("d", "x"), 0)

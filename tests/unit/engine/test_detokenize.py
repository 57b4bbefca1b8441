"""Streamed text is the tokenizer's own, never provisional, and ends at a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from narrows.engine.detokenize import WINDOW, StreamDecoder

CORPUS = [
    "The narrow channel carries the ship; the ship's crew don't mind. ",
    "长的输入通过狭窄的通道,更快。今天天气很好。",
    "👩‍🚀 🚀 👍🏽 naïve café — “quotes” … \r\n\tdef f(x):\n    return x**2\n",
]
UNKNOWN = 10_000
"""An id beyond the vocabulary, as a model with padded embeddings can produce."""


def byte_level():
    """Byte-level BPE, as in GPT-2, Llama 3, Qwen and SmolLM."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS * 3, trainer)
    raw.add_tokens([AddedToken("<note>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def byte_fallback():
    """Pieces with a space mark and single bytes for the rest, as in Llama 2, Mistral and Gemma;
    the decoder strips the leading space."""
    words = ["▁", "▁the", "▁ship", "the", "ship", "s", "a", "n", ".", "长", "▁通"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    raw = Tokenizer(model)
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


def whole(tokenizer, ids, skip=True):
    return tokenizer.decode(ids, skip_special_tokens=skip)


def streamed(tokenizer, ids, stop=(), skip=True, **options):
    decoder = StreamDecoder(tokenizer, stop, skip, **options)
    pieces = [decoder.push(i) for i in ids]
    pieces.append(decoder.flush())
    assert decoder.text == "".join(pieces)
    return pieces, decoder


def byte_pieces(tokenizer):
    """The id of the token that stands for each single byte."""
    vocabulary = tokenizer.get_vocab()
    if "<0x00>" in vocabulary:
        return [vocabulary[f"<0x{b:02X}>"] for b in range(256)]
    # GPT-2's alphabet: printable bytes stand for themselves, the others for 256, 257, ...
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [vocabulary[chr(b if b in shown else 256 + hidden.index(b))] for b in range(256)]


BYTES = {id(tokenizer): byte_pieces(tokenizer) for tokenizer in TOKENIZERS.values()}


def byte_ids(tokenizer, text):
    """One token a byte."""
    return [BYTES[id(tokenizer)][b] for b in text.encode()]


texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*CORPUS, "  ", " the", "长", "🚀", "👩‍🚀"]), max_size=4).map("".join),
)


@st.composite
def token_runs(draw, tokenizer):
    """Sensible text, whole or a byte at a time, between arbitrary tokens of every kind."""
    parts = draw(
        st.lists(
            st.one_of(
                texts.map(lambda t: tokenizer.encode(t, add_special_tokens=False)),
                texts.map(lambda t: byte_ids(tokenizer, t)),
                st.lists(st.integers(0, len(tokenizer) - 1), max_size=40),
                st.sampled_from([[0], [1], [1] * 30, [UNKNOWN]]),
            ),
            max_size=5,
        )
    )
    return [i for part in parts for i in part]


names = pytest.mark.parametrize("name", list(TOKENIZERS))
flags = pytest.mark.parametrize("skip", [True, False])


# ------------------------------------------------------------------------------------------- text


@names
@flags
@given(data=st.data())
def test_the_pieces_are_the_text(name, skip, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(token_runs(tokenizer))
    pieces, _ = streamed(tokenizer, ids, skip=skip)
    assert "".join(pieces) == whole(tokenizer, ids, skip)


@names
@given(data=st.data())
def test_what_was_given_out_is_a_beginning_of_the_text_whatever_follows(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(token_runs(tokenizer))
    decoder = StreamDecoder(tokenizer)
    for n, token in enumerate(ids, 1):
        decoder.push(token)
        assert whole(tokenizer, ids).startswith(decoder.text)
        assert whole(tokenizer, ids[:n]).startswith(decoder.text)


@names
@given(text=texts)
def test_no_replacement_character_in_whole_text(name, text):
    tokenizer = TOKENIZERS[name]
    pieces, _ = streamed(tokenizer, byte_ids(tokenizer, text.replace("\ufffd", "")))
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    tokenizer = TOKENIZERS["byte-level"]
    pieces, _ = streamed(tokenizer, byte_ids(tokenizer, "a长🚀b"))
    assert pieces == ["a", "", "", "长", "", "", "", "🚀", "b", ""]


def test_byte_tokens_come_when_their_run_ends():
    tokenizer = TOKENIZERS["byte-fallback"]
    the = tokenizer.get_vocab()["▁the"]
    pieces, _ = streamed(tokenizer, [the, *byte_ids(tokenizer, "é"), the])
    assert pieces == ["the", "", "", "é the", ""]


@names
def test_a_broken_character_is_shown_in_the_end(name):
    tokenizer = TOKENIZERS[name]
    ids = byte_ids(tokenizer, "长")[:2]
    pieces, _ = streamed(tokenizer, ids)
    assert pieces[:2] == ["", ""]
    assert pieces[2] == whole(tokenizer, ids)
    assert set(pieces[2]) == {"\ufffd"}


def test_a_leading_space_is_what_the_tokenizer_makes_of_it():
    tokenizer = TOKENIZERS["byte-level"]
    assert streamed(tokenizer, tokenizer.encode(" the ship"))[1].text == " the ship"
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = [tokenizer.get_vocab()[p] for p in ("▁the", "▁ship", "</s>", "▁the")]
    assert streamed(tokenizer, ids)[1].text == "the ship the"


class Counting:
    """Counts the tokens a tokenizer is asked to decode."""

    def __init__(self, tokenizer):
        self.inner, self.decoded, self.widest = tokenizer, 0, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        self.widest = max(self.widest, len(ids))
        return self.inner.decode(ids, **options)


@names
@pytest.mark.parametrize("kind", ["text", "specials", "broken bytes"])
def test_the_work_per_token_does_not_grow(name, kind):
    tokenizer = Counting(TOKENIZERS[name])
    ids = {
        "text": tokenizer.encode("the ship's " * 400, add_special_tokens=False),
        "specials": [tokenizer.bos_token_id] * 2000,
        "broken bytes": byte_ids(tokenizer.inner, "长")[1:2] * 2000,
    }[kind]
    _, decoder = streamed(tokenizer, ids)
    assert decoder.text == whole(tokenizer.inner, ids)
    assert tokenizer.decoded <= 4 * WINDOW * len(ids)


# ------------------------------------------------------------------------------------------ stops


def first_stop(text, stops):
    """Character by character: where the text ends, or None."""
    for end in range(1, len(text) + 1):
        lengths = [len(s) for s in stops if text[:end].endswith(s)]
        if lengths:
            return end - max(lengths)
    return None


@names
@settings(max_examples=200)
@given(data=st.data())
def test_text_ends_before_the_first_stop_string_however_it_falls_into_tokens(name, data):
    tokenizer = TOKENIZERS[name]
    vocabulary = tokenizer.get_vocab()
    letters = [vocabulary[p] for p in "sans.a"]
    ids = data.draw(st.lists(st.sampled_from(letters), max_size=30))
    stops = data.draw(st.lists(st.text("sna.", min_size=1, max_size=4), max_size=4))
    # Half of the examples join letters to the same text in larger tokens.
    text = whole(tokenizer, ids)
    if name == "byte-level" and data.draw(st.booleans()):
        ids = tokenizer.encode(text)
    pieces, decoder = streamed(tokenizer, ids, stops)
    cut = first_stop(text, stops)
    assert decoder.stopped == (cut is not None)
    assert "".join(pieces) == text[:cut]
    assert not any(s in "".join(pieces) for s in stops)


def run(text, stops, **options):
    tokenizer = TOKENIZERS["byte-level"]
    return streamed(tokenizer, byte_ids(tokenizer, text), stops, **options)


def test_a_stop_string_over_several_tokens_is_found_and_left_out():
    pieces, decoder = run("the ship sinks", ["ship"])
    assert decoder.text == "the "
    assert decoder.stopped
    assert pieces[4:] == [""] * len(pieces[4:])


def test_only_a_possible_beginning_is_held_back():
    pieces, decoder = run("a ###b ##", ["###!"])
    assert pieces == ["a", " ", "", "", "", "###b", " ", "", "", "##"]
    assert not decoder.stopped


def test_the_stop_completed_first_wins_and_the_longest_of_those():
    assert run("abcd", ["bcd", "c"])[1].text == "ab"
    assert run("abcd", ["c", "bc"])[1].text == "a"
    one_token = [TOKENIZERS["byte-level"].get_vocab()["<note>"]]
    assert streamed(TOKENIZERS["byte-level"], one_token, ["note", "o"])[1].text == "<n"


def test_stop_strings_of_several_bytes_and_over_a_special_token():
    tokenizer = TOKENIZERS["byte-level"]
    assert run("天气很好", ["很"])[1].text == "天气"
    ids = [*byte_ids(tokenizer, "ab"), tokenizer.eos_token_id, *byte_ids(tokenizer, "cd")]
    assert streamed(tokenizer, ids, ["bc"])[1].text == "a"


def test_special_tokens_can_be_shown_and_stopped_at():
    tokenizer = TOKENIZERS["byte-level"]
    ids = [*byte_ids(tokenizer, "ab"), tokenizer.eos_token_id, *byte_ids(tokenizer, "cd")]
    assert streamed(tokenizer, ids, skip=False)[1].text == "ab</s>cd"
    assert streamed(tokenizer, ids, ["</s>"], skip=False)[1].text == "ab"


def test_nothing_comes_after_a_stop():
    tokenizer = TOKENIZERS["byte-level"]
    decoder = StreamDecoder(tokenizer, ["."])
    for token in tokenizer.encode("mind. The"):
        decoder.push(token)
    assert decoder.stopped
    assert decoder.push(tokenizer.encode("x")[0]) == ""
    assert decoder.flush() == ""
    assert decoder.text == "mind"


def test_stops_wait_for_the_least_number_of_tokens():
    assert run("a.b.c.d", ["."], min_tokens=3)[1].text == "a.b"
    assert run("a.b.c.d", ["."], min_tokens=4)[1].text == "a.b.c"
    assert run("a.b", ["."], min_tokens=3)[1].text == "a.b"


@pytest.mark.model
def test_the_default_models_tokenizer(smollm):
    text = " Lead. " + "".join(CORPUS) * 3
    ids = smollm.tokenizer.encode(text)
    pieces, decoder = streamed(smollm.tokenizer, [*ids, smollm.tokenizer.eos_token_id])
    assert decoder.text == text
    assert max(len(p) for p in pieces) < 30
    _, decoder = streamed(smollm.tokenizer, ids, ["天气很"])
    assert decoder.text == text[: text.index("天气很")]

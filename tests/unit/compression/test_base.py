import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_tokenizers
from narrows.compression.base import Choice, UnitCompressor
from narrows.compression.select import fill
from narrows.compression.units import encode
from narrows.contracts import CompressedPrompt
from narrows.errors import BudgetError, ConfigError, InputError
from oracles.units_reference import splits_a_cluster
from tiny_tokenizers import KINDS

PROSE = " ".join(tiny_tokenizers.CORPUS)
GRANULARITIES = ("token", "word", "phrase", "sentence")


class Fixed(UnitCompressor):
    """Scores that depend on the text alone, so that only the budget changes the choice."""

    method = "fixed"
    calls = 0

    def choose(self, prepared, question):
        self.calls += 1
        rng = np.random.default_rng(len(prepared.tokens.ids))
        scores, free = rng.random(len(prepared.units)), ~prepared.forced
        kept = prepared.forced.copy()
        kept[free] = fill(scores[free], prepared.units.costs[free], prepared.free)
        return Choice(
            kept,
            np.repeat(scores, prepared.units.costs),
            {"question": question, "odd": np.float32(0.5), "nan": [np.nan], "warnings": ["hm"]},
        )


def fixed(kind="bytes", **options):
    return Fixed(tokenizer=tiny_tokenizers.make(kind), **options)


@settings(max_examples=200)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(GRANULARITIES),
    tiny_tokenizers.texts,
    st.floats(0.01, 1.0),
)
def test_output_is_whole_characters_of_the_source_within_budget(kind, granularity, text, keep):
    result = fixed(kind, granularity=granularity).compress(text, keep_ratio=keep)
    assert result.text == "".join(text[a:b] for a, b in result.kept)
    ends = [position for span in result.kept for position in span]
    assert ends == sorted(set(ends)), "spans rise, are not empty and do not touch"
    assert not splits_a_cluster(text, result.kept)
    result.text.encode()
    assert result.text.count("\ufffd") <= text.count("\ufffd")
    assert result.tokens == len(result.kept_token_indices) <= max(result.requested_tokens, 0)
    assert list(result.kept_token_indices) == sorted(set(result.kept_token_indices))


@given(tiny_tokenizers.texts, st.integers(1, 80))
def test_budget_is_missed_by_less_than_a_unit(text, target):
    compressor = fixed(granularity="word")
    result = compressor.compress(text, target_tokens=target)
    if result.original_tokens <= target:
        assert result.text == text
    else:
        largest = max(unit_costs(text, "word"), default=1)
        assert target - (largest - 1) <= result.tokens <= target


def unit_costs(text, granularity):
    from narrows.compression.units import make_units, tokenize

    return make_units(tokenize(text, tiny_tokenizers.make("bytes")), granularity).costs.tolist()


def test_single_token_units_meet_the_budget_exactly():
    text = "The ferry left Bergen at dawn, carrying 212 people."
    total = len(unit_costs(text, "token"))
    for target in range(1, total):
        assert fixed().compress(text, target_tokens=target).tokens == target


def test_a_larger_budget_keeps_all_a_smaller_one_did():
    kept = [
        set(fixed().compress(PROSE[:78], target_tokens=b).kept_token_indices) for b in (5, 6, 9)
    ]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["", " ", "x", " a  b \t\r\n ", "\r\n\r\n", "a\x00b\ufeff ", "\ufeffx\u2028 ", PROSE]
)
def test_keeping_all_is_byte_identical_and_asks_no_method(kind, text):
    for budget in ({"keep_ratio": 1.0}, {"keep_ratio": 1}, {"target_tokens": 10_000}):
        for target in (None, tiny_tokenizers.make("metaspace")):
            compressor = fixed(kind, target_tokenizer=target, protect="@digits")
            result = compressor.compress(text, **budget)
            assert result.text.encode() == text.encode()
            assert result.kept == (((0, len(text)),) if text else ())
            assert result.kept_token_indices == tuple(range(result.original_tokens))
            assert result.ratio == 1.0
            assert compressor.calls == 0


@pytest.mark.parametrize("text", [" ", "x", "x y", "a" * 5000, "\n" * 300, "👩‍👩‍👧", "7 8 9"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_edge_texts_have_defined_results(text, granularity):
    result = fixed(granularity=granularity).compress(text, target_tokens=1)
    assert result.tokens <= 1
    assert result.text in ("", text) or len(result.text) < len(text)
    if not result.text:
        assert "nothing fits in 1 tokens" in result.report["warnings"]


def test_everything_protected_is_kept_whole_or_refused():
    everything = fixed(protect=[(0, 5)], on_infeasible="keep_forced")
    assert everything.compress("a b c", target_tokens=2).text == "a b c"
    with pytest.raises(BudgetError):
        fixed(protect=[(0, 5)]).compress("a b c", target_tokens=2)


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"target_tokens": 3, "keep_ratio": 0.5},
        *({"target_tokens": bad} for bad in (0, -1, True, 2.0, "3", float("nan"))),
        *({"keep_ratio": bad} for bad in (0, 0.0, -0.1, 1.01, 2, True, "0.5", float("nan"))),
    ],
)
@pytest.mark.parametrize("text", ["", "some text"])
def test_bad_budgets_are_refused(budget, text):
    with pytest.raises(ConfigError, match=r"target_tokens|keep_ratio"):
        fixed().compress(text, **budget)


def test_a_ratio_rounds_down_but_not_below_its_decimal():
    text = "x" + " x" * 99
    original = fixed().compress(text, keep_ratio=1.0).original_tokens
    for percent in range(1, 101):
        got = fixed().compress(text, keep_ratio=percent / 100).requested_tokens
        assert got == max(1, percent * original // 100)
    assert fixed().compress(text, target_tokens=np.int64(7)).tokens == 7


def test_text_that_is_no_text_is_refused():
    with pytest.raises(InputError, match="bytes"):
        fixed().compress(b"text", keep_ratio=0.5)
    with pytest.raises(InputError, match="surrogate"):
        fixed().compress("a\udc80", keep_ratio=0.5)


@pytest.mark.parametrize(
    "options",
    [{"granularity": "line"}, {"on_infeasible": "shrug"}, {"protect": "@nothing"}],
)
def test_bad_options_are_refused_at_once(options):
    with pytest.raises(ConfigError):
        fixed(**options)


def test_no_model_and_no_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="'fixed' needs a model or a tokenizer"):
        Fixed()


@pytest.mark.parametrize("target", [None, "wordpiece"])
def test_protected_text_beyond_the_budget(target):
    tokenizer = None if target is None else tiny_tokenizers.make(target)
    protect = ["Bergen at dawn", "@digits"]

    def made(policy):
        options = {"protect": protect, "on_infeasible": policy, "target_tokenizer": tokenizer}
        return fixed(**options).compress(PROSE, target_tokens=4)

    with pytest.raises(BudgetError, match="budget of 4"):
        made("error")
    whole = made("keep_forced")
    assert all(part in whole.text for part in ("Bergen at dawn", "212", "1907"))
    assert (whole.target_tokens or whole.tokens) > 4
    assert "kept all" in whole.report["warnings"][0]
    trimmed = made("trim_forced")
    assert 0 < (trimmed.target_tokens or trimmed.tokens) <= 4
    assert whole.text.startswith(trimmed.text)


@given(st.data(), st.sampled_from(GRANULARITIES))
def test_protected_spans_are_in_the_output(data, granularity):
    start = data.draw(st.integers(0, len(PROSE) - 9))
    span = (start, start + data.draw(st.integers(1, 9)))
    result = fixed(granularity=granularity, on_infeasible="keep_forced").compress(
        PROSE, keep_ratio=0.3, protect=[span]
    )
    assert any(a <= span[0] and span[1] <= b for a, b in result.kept)


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(["wordpiece", "metaspace", "normalised"]),
    tiny_tokenizers.texts,
    st.integers(1, 40),
)
def test_target_tokens_are_counted_on_the_output(kind, target_kind, text, target):
    target_tokenizer = tiny_tokenizers.make(target_kind)
    compressor = fixed(kind, target_tokenizer=target_tokenizer)
    try:
        result = compressor.compress(text, target_tokens=target)
    except BudgetError:
        # a tokenizer that sees nothing in a text the target's sees has nothing to select
        assert not encode(text, tiny_tokenizers.make(kind))["input_ids"]
        return
    count = len(encode(result.text, target_tokenizer)["input_ids"]) if result.text else 0
    assert result.target_tokens == count <= target
    assert compressor.calls <= 8


def test_target_budget_is_nearly_used():
    target = tiny_tokenizers.make("metaspace")
    result = fixed(target_tokenizer=target).compress(PROSE * 5, target_tokens=150)
    assert 140 <= result.target_tokens <= 150
    assert result.report["selections"] <= 8


def test_a_method_that_breaks_its_promise_is_a_bug():
    class Greedy(Fixed):
        def choose(self, prepared, question):
            return Choice(np.ones(len(prepared.units), dtype=bool))

    class Careless(Fixed):
        def choose(self, prepared, question):
            return Choice(np.zeros(len(prepared.units), dtype=bool))

    for broken in (Greedy, Careless):
        with pytest.raises(RuntimeError, match="kept"):
            broken(tokenizer=tiny_tokenizers.make("bytes"), protect="Bergen").compress(
                PROSE, keep_ratio=0.5
            )


def test_result_survives_json_and_highlights_the_source():
    result = fixed(protect="@digits").compress(PROSE, keep_ratio=0.4, question="who?")
    again = CompressedPrompt.from_json(result.to_json())
    assert again == result
    assert "".join(PROSE[a:b] for a, b in again.kept) == again.text
    report = again.report
    assert report["question"] == "who?"
    assert report["odd"] == 0.5
    assert report["nan"] == [None]
    assert report["warnings"] == ["hm"]
    assert set(report["timings"]) == {"prepare", "choose"}
    assert len(again.scores) == again.original_tokens
    with_target = fixed(target_tokenizer=tiny_tokenizers.make("wordpiece"))
    result = with_target.compress("a b c", keep_ratio=1.0)
    assert CompressedPrompt.from_json(result.to_json()) == result


@pytest.mark.parametrize("data", ["", "[]", "{}", '{"kept": 3}', "null", '{"kept": [[1]]}'])
def test_other_json_is_refused(data):
    with pytest.raises(InputError, match="not a compressed prompt"):
        CompressedPrompt.from_json(data)


def test_fingerprint_follows_settings_only():
    def fingerprint(text="some words here", **options):
        return fixed(**options).compress(text, keep_ratio=0.5).report["fingerprint"]

    assert fingerprint() == fingerprint("some other words")
    others = [
        {"granularity": "word"},
        {"protect": "@digits", "on_infeasible": "keep_forced"},
        {"on_infeasible": "keep_forced"},
    ]
    assert len({fingerprint(), *(fingerprint(**o) for o in others)}) == 4


def test_same_input_same_output():
    results = [fixed().compress(PROSE, keep_ratio=0.5) for _ in range(2)]
    first, second = (dataclasses.replace(r, report={}) for r in results)
    assert first == second

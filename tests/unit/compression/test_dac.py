"""DAC against the method by the book, and its stages, budgets, chunks and edges."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import tiny_text
from narrows.compression import dac as presets
from narrows.compression import score
from narrows.compression.base import Prepared
from narrows.compression.dac import DAC, DacOptions, clipped, fuse, scaled
from narrows.compression.select import stage_targets
from narrows.compression.stages import keep_apart, keep_shares
from narrows.compression.units import TokenizedText, Units, make_units
from narrows.errors import ConfigError
from oracles import dac_reference, select_reference

FAMILIES = ["llama", "qwen2", "gemma3_text", "gpt2"]
LONG = tiny_text.MIXED * 3


@pytest.fixture(scope="module")
def model():
    return tiny_text.pair()[0]


@pytest.fixture(scope="module")
def llama():
    return tiny.pair("llama")[0]


def letters(n, seed=0):
    """``n`` random single-character tokens of the plain tiny models' vocabulary."""
    ids = np.random.default_rng(seed).integers(3, 101, n).tolist()
    return TokenizedText("a" * n, ids, [(i, i + 1) for i in range(n)])


def ready(n, budget, forced=()):
    tokens = letters(n)
    units = make_units(tokens)
    held = np.zeros(n, dtype=bool)
    held[list(forced)] = True
    return Prepared(tokens, units, held, budget)


def chosen(model, prepared, **options):
    return DAC(model, tokenizer=tiny_text.tokenizer(), **options).choose(prepared, None)


def spy(model, monkeypatch):
    """The lengths of all passes through the model from here on."""
    lengths, hidden = [], model.hidden

    def counted(ids, positions, batch):
        lengths.append(len(ids))
        return hidden(ids, positions, batch)

    monkeypatch.setattr(model, "hidden", counted)
    return lengths


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("fusion", "alpha"), [("additive", 0.8), ("additive", 0.3), ("multiplicative", 0.8)]
)
def test_equals_the_method_by_the_book(family, fusion, alpha):
    model, stock = tiny.pair(family)
    prepared = ready(90, 31)
    choice = chosen(model, prepared, fusion=fusion, alpha=alpha, stages=4)
    targets = stage_targets(89, 30, 4)
    expected = dac_reference.keep(stock, prepared.tokens.ids, targets, alpha, fusion)
    assert np.flatnonzero(choice.kept).tolist() == expected
    assert [s["kept"] - 1 for s in choice.report["stages"]] == targets


class TestFuse:
    surprisal = np.array([9.0, 1.0, 3.0, 2.0, 5.0])
    attention = np.array([9.0, 0.4, 0.1, 0.3, 0.2])

    def fused(self, surprisal=surprisal, attention=attention, **options):
        return fuse(surprisal, attention, DacOptions(**options))

    def test_the_ends_of_alpha_are_one_signal_alone(self):
        assert np.argsort(self.fused(alpha=0.0)[1:]).tolist() == [0, 2, 1, 3]
        assert np.argsort(self.fused(alpha=1.0)[1:]).tolist() == [1, 3, 2, 0]
        np.testing.assert_array_equal(self.fused(alpha=0.0), self.fused(attention=None, alpha=0.0))

    def test_additive_by_hand(self):
        expected = [0.0, 0.8, 0.2 * 0.5, 0.2 * 0.25 + 0.8 * 2 / 3, 0.2 + 0.8 / 3]
        np.testing.assert_allclose(self.fused(), expected)

    def test_multiplicative_is_the_plain_product(self):
        expected = [0.0, 0.4, 0.3, 0.6, 1.0]
        np.testing.assert_allclose(self.fused(fusion="multiplicative"), expected)

    def test_a_constant_signal_has_no_say(self):
        constant = np.full(5, 0.7)
        np.testing.assert_array_equal(self.fused(attention=constant, alpha=1.0), np.zeros(5))
        np.testing.assert_array_equal(self.fused(constant, constant), np.zeros(5))
        assert scaled(np.array([1.0, 1.0 + 1e-9])).tolist() == [0.0, 0.0]

    def test_clipping_takes_an_outlier_s_power(self):
        values = np.array([1.0] * 50 + [2.0] * 49 + [1000.0])
        assert clipped(values, 0.98).max() == 2.0
        assert clipped(values, None) is values
        outlier = np.array([0.0, 0.1, 0.2, 0.3, 50.0])
        plain, cut = (self.fused(attention=outlier, clip_quantile=q) for q in (None, 0.6))
        assert plain[3] < plain[2]  # surprisal decides
        assert cut[3] > cut[2]  # attention does

    @pytest.mark.parametrize("n", [1, 2])
    def test_hardly_any_tokens(self, n):
        assert self.fused(np.zeros(n), np.zeros(n)).tolist() == [0.0] * n


class TestStages:
    @pytest.mark.parametrize("stages", [1, 2, 5, 15])
    @pytest.mark.parametrize("refresh", ["stage", "once"])
    def test_one_pass_a_stage(self, llama, monkeypatch, stages, refresh):
        lengths = spy(llama, monkeypatch)
        report = chosen(llama, ready(200, 40), stages=stages, attn_refresh=refresh).report
        assert report["stages_used"] == len(lengths) == stages
        assert lengths == [200, *(s["kept"] for s in report["stages"][:-1])]

    def test_no_pass_when_nothing_goes(self, monkeypatch, model):
        lengths = spy(model, monkeypatch)
        assert DAC(model).compress(LONG, keep_ratio=1.0).text == LONG
        assert DAC(model).compress(LONG, target_tokens=10**6).text == LONG
        assert lengths == []

    def test_a_stage_that_would_delete_nothing_is_left_out(self, llama, monkeypatch):
        lengths = spy(llama, monkeypatch)
        assert chosen(llama, ready(50, 48), stages=15).kept.sum() == 48
        assert len(lengths) == 2

    def test_static_is_one_stage(self, llama):
        prepared = ready(300, 100)
        one = chosen(llama, prepared, stages=1)
        preset = presets.dac_static(llama, tokenizer=tiny_text.tokenizer())
        for static in (chosen(llama, prepared, dynamic=False), preset.choose(prepared, None)):
            np.testing.assert_array_equal(static.kept, one.kept)
        assert (chosen(llama, prepared, stages=5).kept != one.kept).any()

    @pytest.mark.parametrize(("n", "stages"), [(60, 1), (199, 1), (200, 2), (450, 4)])
    def test_one_stage_for_a_hundred_tokens_by_default(self, llama, n, stages):
        assert chosen(llama, ready(n, n // 3)).report["stages_used"] == stages

    def test_at_most_fifteen(self):
        assert DacOptions().planned_stages(10**6, 10**6, 10**5, 1.0) == 15

    def test_what_later_stages_keep_earlier_ones_kept(self, llama, monkeypatch):
        kept_sets, stage = [], DAC._stage

        def watched(self, state, target):
            stage(self, state, target)
            kept_sets.append(state.kept.copy())

        monkeypatch.setattr(DAC, "_stage", watched)
        chosen(llama, ready(200, 20), stages=6)
        assert len(kept_sets) == 6
        assert all((late <= early).all() for early, late in itertools.pairwise(kept_sets))

    def test_static_choices_are_nested_in_the_budget(self, llama):
        kept = [chosen(llama, ready(60, b), dynamic=False).kept for b in range(1, 60, 7)]
        assert all((small <= large).all() for small, large in itertools.pairwise(kept))

    def test_deleting_a_predecessor_changes_a_survivor_s_surprisal(self, llama):
        stages = chosen(llama, ready(200, 50), stages=3, diagnose=True).report["stages"]
        assert "entropy_shift" not in stages[0]
        for stage in stages[1:]:
            assert stage["entropy_shift"]["mean_abs"] > 0.01
            assert -1 <= stage["entropy_shift"]["pearson"] <= 1

    def test_once_keeps_the_first_attention(self, llama):
        prepared = ready(200, 50)
        once = chosen(llama, prepared, stages=4, attn_refresh="once", alpha=1.0)
        static = chosen(llama, prepared, stages=1, alpha=1.0)
        np.testing.assert_array_equal(once.kept, static.kept)  # attention alone, unchanged
        assert (chosen(llama, prepared, stages=4, alpha=1.0).kept != static.kept).any()

    def test_once_sums_attention_in_the_first_stage_only(self, llama, monkeypatch):
        rows, sums = [], score.blocked_attention

        def counted(q, *rest):
            rows.append(len(q))
            return sums(q, *rest)

        monkeypatch.setattr(score, "blocked_attention", counted)
        chosen(llama, ready(200, 50), stages=4, attn_refresh="once")
        assert rows == [200] * len(llama.shape.layers)

    def test_surprisal_alone_never_asks_for_attention(self, llama, monkeypatch):
        monkeypatch.setattr(score, "blocked_attention", None)
        preset = presets.surprisal_dynamic(llama, tokenizer=tiny_text.tokenizer())
        choice = preset.choose(ready(200, 50), None)
        assert (choice.kept.sum(), choice.report["stages_used"]) == (50, 2)


class TestBudget:
    @settings(max_examples=30)
    @given(st.data())
    def test_met_exactly_with_single_token_units(self, data):
        model, _ = tiny.pair("llama")
        n = data.draw(st.integers(2, 60))
        forced = data.draw(st.sets(st.integers(0, n - 1), max_size=n // 2))
        budget = data.draw(st.integers(len(forced) + 1, n))
        choice = chosen(
            model,
            ready(n, budget, forced),
            stages=data.draw(st.integers(1, 6)),
            chunk_tokens=data.draw(st.sampled_from([0, 7, 20])),
            left_context=data.draw(st.sampled_from([0, 3])),
            adjacent=data.draw(st.booleans()),
            fusion=data.draw(st.sampled_from(["additive", "multiplicative"])),
        )
        assert choice.kept.sum() == budget
        assert choice.kept[list(forced)].all()

    @pytest.mark.parametrize("granularity", ["token", "word", "sentence"])
    @pytest.mark.parametrize(
        "options", [{}, {"adjacent": False}, {"chunk_policy": "proportional", "chunk_tokens": 90}]
    )
    @pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
    def test_within_one_unit_otherwise(self, model, granularity, options, keep):
        prepared = tiny_text.prepare(LONG, keep, granularity, forced=(2, 5))
        tiny_text.assert_within_one_unit(prepared, chosen(model, prepared, **options).kept)

    def test_the_first_token_stays_unless_it_does_not_fit(self, llama, model):
        for keep in (0.02, 0.3):
            assert chosen(model, tiny_text.prepare(LONG, keep)).kept[0]
        wide = Units(np.array([0, 4, *range(5, 11)]))
        choice = chosen(llama, Prepared(letters(10), wide, np.zeros(7, bool), 3))
        assert choice.kept.sum() == 3
        assert not choice.kept[0]
        assert "first token" in choice.report["warnings"][0]


class TestApart:
    @settings(max_examples=150)
    @given(st.data())
    def test_single_units_are_the_optimum(self, data):
        n = data.draw(st.integers(2, 12))
        scores = np.array(data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)))
        free = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        free[data.draw(st.integers(0, n - 1))] = True
        budget = data.draw(st.integers(0, int(free.sum()) - 1))
        kept = keep_apart(scores, np.ones(n, np.int64), free, budget)
        deleted = free & ~kept
        assert not (deleted[1:] & deleted[:-1]).any()
        assert not kept[~free].any()
        assert kept.sum() >= budget
        best = select_reference.least_apart_by_trial(scores, free, int(deleted.sum()))
        assert scores[deleted].sum() == pytest.approx(best)
        if kept.sum() > budget:  # then more is impossible
            more = select_reference.least_apart_by_trial(scores, free, int(deleted.sum()) + 1)
            assert more == np.inf

    @settings(max_examples=150)
    @given(st.data())
    def test_wide_units_miss_by_less_than_one(self, data):
        n = data.draw(st.integers(2, 30))
        sizes = st.lists(st.integers(1, 4), min_size=n, max_size=n)
        costs = np.array(data.draw(sizes), dtype=np.int64)
        free = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        free[data.draw(st.integers(0, n - 1))] = True
        scores = np.random.default_rng(data.draw(st.integers(0, 99))).random(n)
        budget = data.draw(st.integers(0, int(costs[free].sum()) - 1))
        kept = keep_apart(scores, costs, free, budget)
        deleted = free & ~kept
        assert deleted.any()
        assert not (deleted[1:] & deleted[:-1]).any()
        assert costs[kept].sum() > budget - costs.max()

    @pytest.mark.parametrize("budget", [1, 10, 20, 45])
    @pytest.mark.parametrize("stages", [1, 2, 9])
    def test_stages_are_raised_and_reported(self, llama, budget, stages):
        report = chosen(llama, ready(100, budget), stages=stages, adjacent=False).report
        kept = [100, *(s["kept"] for s in report["stages"])]
        assert kept[-1] == budget
        assert all(a - b <= -(-(a - 1) // 2) for a, b in itertools.pairwise(kept))
        raised = report["stages_used"] > stages
        assert raised == any("stages instead of" in w for w in report["warnings"])
        assert raised or stages > 1

    def test_protected_neighbours_are_no_obstacle(self, llama):
        choice = chosen(llama, ready(60, 31, range(0, 60, 2)), stages=1, adjacent=False)
        assert choice.kept.sum() == 31
        assert choice.report["stages_used"] == 1


class TestChunks:
    @pytest.mark.parametrize("policy", ["global", "proportional"])
    def test_a_chunk_as_long_as_the_text_is_no_chunk(self, llama, policy):
        prepared = ready(120, 40)
        off = chosen(llama, prepared, chunk_tokens=0)
        on = chosen(llama, prepared, chunk_tokens=120, chunk_policy=policy)
        np.testing.assert_array_equal(on.kept, off.kept)
        assert on.scores.tobytes() == off.scores.tobytes()
        assert (chosen(llama, prepared, chunk_tokens=50).scores != off.scores).any()

    @settings(max_examples=100)
    @given(st.data())
    def test_proportional_keeps_the_same_share_of_every_chunk(self, data):
        n, chunks = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 5))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        chunk = np.sort(rng.integers(0, chunks, n))
        free = rng.random(n) < 0.8
        costs = rng.integers(1, data.draw(st.sampled_from([2, 4])), n)
        scores = rng.random(n)
        total = int(costs[free].sum())
        budget = data.draw(st.integers(0, total))
        kept = keep_shares(scores, costs, free, budget, chunk)
        assert not kept[~free].any()
        widest = int(costs.max())
        assert budget - widest < costs[kept].sum() <= budget
        if widest > 1:
            return
        for c in range(chunks):
            inside = free & (chunk == c)
            count = int(kept[inside].sum())
            assert abs(count - inside.sum() * budget / max(1, total)) < 1
            best = np.sort(scores[inside])[len(scores[inside]) - count :]
            np.testing.assert_array_equal(np.sort(scores[inside & kept]), best)

    def test_proportional_ends_at_the_budget(self, llama):
        options = {"chunk_tokens": 40, "chunk_policy": "proportional", "left_context": 5}
        choice = chosen(llama, ready(200, 61), stages=1, **options)
        assert choice.kept.sum() == 61
        kept = [part.sum() for part in np.array_split(choice.kept, 5)]
        assert max(kept) - min(kept) <= 2


class TestDeterminism:
    def test_repeats_threads_and_batching(self, llama, monkeypatch):
        prepared = ready(200, 60)

        def again():
            return chosen(llama, prepared, chunk_tokens=40)

        first = again()
        assert again().scores.tobytes() == first.scores.tobytes()
        threads = torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                np.testing.assert_array_equal(again().kept, first.kept)
        finally:
            torch.set_num_threads(threads)
        monkeypatch.setattr(score, "PASS_TOKENS", 1)
        np.testing.assert_array_equal(again().kept, first.kept)

    def test_ties_go_to_the_earlier_token(self):
        model, _ = tiny.pair.__wrapped__("llama")
        for weight in model.model.parameters():
            weight.zero_()  # every token is as surprising as any other
        kept = chosen(model, ready(30, 12), stages=1, alpha=0.0).kept
        assert np.flatnonzero(kept).tolist() == list(range(12))


class TestEdges:
    @pytest.mark.parametrize(
        "text",
        ["", " ", "a", "ab", "\n\n\n\n\n", "x" * 5000, "渡轮", "👩‍👩‍👧", "\ufeff\x00\r\n"],
        ids=["empty", "blank", "one", "two", "newlines", "one word", "cjk", "emoji", "odd"],
    )
    @pytest.mark.parametrize("name", ["dac", "dac_apart", "dac_multiplicative"])
    def test_odd_texts(self, model, text, name):
        compressor = getattr(presets, name)(model, chunk_tokens=200, stages=4)
        for keep in (0.01, 0.5, 1.0):
            result = compressor.compress(text, keep_ratio=keep)
            assert result.tokens <= max(1, keep * result.original_tokens)
            assert result.text == "".join(text[a:b] for a, b in result.kept)
            assert "\ufffd" not in result.text
        assert result.text == text

    @pytest.mark.parametrize("n", [99, 100, 101])
    def test_around_a_chunk(self, llama, n):
        assert chosen(llama, ready(n, 40), chunk_tokens=100).kept.sum() == 40

    def test_all_protected(self, model):
        text = tiny_text.PROSE
        keep = DAC(model, protect=[(0, len(text))], on_infeasible="keep_forced")
        assert keep.compress(text, keep_ratio=0.5).text == text

    def test_protected_text_survives_every_stage(self, model):
        result = DAC(model, protect="@digits", stages=6).compress(LONG, keep_ratio=0.2)
        assert result.text.count("1907") == result.text.count("212") == 3
        assert result.tokens <= result.requested_tokens

    def test_no_model(self):
        with pytest.raises(ConfigError, match="'dac' needs a model"):
            DAC(None)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"alpha": 1.5}, "alpha"),
            ({"fusion": "sum"}, "fusion"),
            ({"stages": 0}, "stages"),
            ({"stages": 3, "dynamic": False}, "dynamic"),
            ({"chunk_policy": "proportional", "adjacent": False}, "chunk_policy"),
            ({"clip_quantile": 0.0}, "clip_quantile"),
            ({"chunk_tokens": -1}, "chunk_tokens"),
            ({"attn_norm": "mean"}, "attn_norm"),
            ({"nonsense": 1}, "nonsense"),
        ],
    )
    def test_bad_options_are_one_line(self, model, options, named):
        with pytest.raises(ConfigError, match=named) as raised:
            DAC(model, **options)
        assert "\n" not in str(raised.value)


def test_diagnostics_are_there_when_asked_for_and_only_then(model):
    result = DAC(model, protect="1907", diagnose=True).compress(LONG, keep_ratio=0.3)
    found = result.report["diagnostics"]
    deciles = found["kept_by_decile"]
    assert len(deciles) == 10
    assert np.mean(deciles) == pytest.approx(result.tokens / result.original_tokens, abs=0.02)
    runs = found["deleted_runs"]
    assert runs["count"] * runs["mean"] == pytest.approx(result.original_tokens - result.tokens)
    forced = result.report["forced_tokens"]
    assert found["forced_share"] == pytest.approx(forced / result.requested_tokens)
    assert found["peak_bytes"] > 0
    for stage in result.report["stages"]:
        assert -1 <= stage["pearson"] <= 1
        assert -1 <= stage["spearman"] <= 1
        assert 0 <= stage["effective_attention_weight"] <= 1
    plain = DAC(model, protect="1907").compress(LONG, keep_ratio=0.3)
    assert plain.text == result.text
    assert "diagnostics" not in plain.report
    assert set(plain.report["stages"][0]) == {"target", "kept", "seconds"}


def test_settings_tell_presets_apart(model):
    kinds = (
        presets.dac,
        presets.dac_multiplicative,
        presets.dac_static,
        presets.dac_apart,
        presets.surprisal_dynamic,
    )
    reports = [kind(model).compress(LONG, keep_ratio=0.9).report for kind in kinds]
    assert len({report["fingerprint"] for report in reports}) == 5

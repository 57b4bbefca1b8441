"""Token scores against prefix passes and full attention maps of stock models."""

import numpy as np
import pytest
import torch

import tiny
from narrows.compression import score as score_module
from narrows.compression.attn_norm import average_ranks, queries_seeing, uniform_mass
from narrows.compression.chunks import split
from narrows.compression.score import OnePassLayer, Scorer
from narrows.errors import ConfigError, NumericalError
from oracles import score_reference as reference

FAMILIES = ["llama", "qwen2", "mistral", "gemma3_text", "gpt2"]


def random_ids(n, seed=0):
    return np.random.default_rng(seed).integers(3, 101, n).tolist()


@pytest.fixture(scope="module")
def llama():
    return tiny.pair("llama")[0]


@pytest.fixture(scope="module")
def even():
    """A model whose attention is uniform: its queries are zero."""
    model, _ = tiny.pair.__wrapped__("llama")
    for name, weight in model.model.named_parameters():
        if "q_proj" in name:
            weight.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_surprisal_is_that_of_separate_prefix_passes(family):
    model, stock = tiny.pair(family)
    ids = random_ids(50)
    expected = reference.surprisal(stock, ids)
    for attention in (True, False):
        found = Scorer(model, chunk_tokens=0).score(ids, attention=attention)
        np.testing.assert_allclose(found.surprisal, expected, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_rows", [1, 7, 64])
def test_attention_is_the_column_sum_of_eager_maps(family, block_rows):
    model, stock = tiny.pair(family)
    ids = random_ids(60)
    found = Scorer(model, chunk_tokens=0, block_rows=block_rows).score(ids).attention
    expected = reference.received(stock, ids)
    assert expected.sum() == pytest.approx(60)  # every row sums to 1
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5, atol=1e-6)
    assert found[0] == 0.0


@pytest.mark.parametrize("n", [3, 40])
def test_uniform_attention_gives_harmonic_sums(even, n):
    ids = random_ids(n)
    expected = np.array(reference.harmonic(n))

    def norm(how):
        return Scorer(even, chunk_tokens=0, attn_norm=how).score(ids).attention[1:]

    np.testing.assert_allclose(norm("sum"), expected[1:], rtol=1e-5)
    np.testing.assert_allclose(norm("per_query"), (expected / np.arange(n, 0, -1))[1:], rtol=1e-5)
    floor = np.maximum(expected, expected[max(0, n - 16)])
    np.testing.assert_allclose(norm("vs_uniform"), (expected / floor)[1:], rtol=1e-5)
    if n == 40:
        np.testing.assert_allclose(norm("vs_uniform")[:-16], 1.0, rtol=1e-5)


def test_the_table_of_uniform_sums():
    """The published table for 2,000 tokens."""
    mass = uniform_mass(2000, (None,))
    places = np.array([1, 2, 10, 50, 100, 500, 1000, 1500, 1900, 2000]) - 1
    sums = [8.178, 7.178, 5.349, 3.699, 3.001, 1.388, 0.694, 0.288, 0.052, 0.0005]
    np.testing.assert_allclose(mass[places], sums, atol=6e-4)
    per_query = [0.00409, 0.00359, 0.00269, 0.00190, 0.00158, 0.00092, 0.00069, 0.00058, 0.00051]
    found = (mass / queries_seeing(2000, (None,)))[places[:-1]]
    np.testing.assert_allclose(found, per_query, atol=6e-6)


def test_norms_know_sliding_windows():
    """Brute force over the maps of a full and a windowed layer of uniform attention."""
    n, windows = 12, (None, 4)
    maps = np.zeros((2, n, n))
    for layer, window in enumerate(windows):
        for i in range(n):
            low = 0 if window is None else max(0, i - window + 1)
            maps[layer, i, low : i + 1] = 1.0 / (i + 1 - low)
    np.testing.assert_allclose(uniform_mass(n, windows), maps.sum(1).mean(0))
    np.testing.assert_allclose(queries_seeing(n, windows), (maps > 0).sum(1).mean(0))


def test_rank_norm_is_the_rank_of_the_sum(llama):
    ids = random_ids(30)
    total = Scorer(llama).score(ids).attention[1:]
    ranks = Scorer(llama, attn_norm="rank").score(ids).attention
    assert ranks[0] == 0.0
    np.testing.assert_allclose(ranks[1:], (np.argsort(np.argsort(total)) + 1) / 29)


def test_equal_values_share_their_rank():
    assert average_ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.parametrize("norm", ["sum", "per_query", "vs_uniform", "rank"])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_a_chunk_as_long_as_the_text_changes_no_bit(llama, n, norm):
    ids = random_ids(n)
    off = Scorer(llama, chunk_tokens=0, attn_norm=norm).score(ids)
    for limit in (n, n + 1, 1000):
        on = Scorer(llama, chunk_tokens=limit, attn_norm=norm).score(ids)
        assert on.surprisal.tobytes() == off.surprisal.tobytes()
        assert on.attention.tobytes() == off.attention.tobytes()
        assert on.chunks == off.chunks == [(0, n)]


@pytest.mark.parametrize("norm", ["sum", "per_query", "vs_uniform", "rank"])
def test_a_chunk_is_scored_as_a_text_of_its_own_after_its_context(llama, norm):
    ids = random_ids(100)
    scorer = Scorer(llama, chunk_tokens=30, left_context=8, attn_norm="sum")
    found = scorer.score(ids)
    assert len(found.chunks) == 4
    for a, b in found.chunks[1:]:
        alone = Scorer(llama, chunk_tokens=0).score(ids[a - 8 : b])
        np.testing.assert_allclose(found.surprisal[a:b], alone.surprisal[8:], atol=1e-5)
        np.testing.assert_allclose(found.attention[a:b], alone.attention[8:], rtol=1e-5, atol=1e-6)
    normed = Scorer(llama, chunk_tokens=30, left_context=8, attn_norm=norm).score(ids).attention
    if norm == "rank":
        for a, b in found.chunks[1:]:
            expected = average_ranks(found.attention[a:b]) / (b - a)
            np.testing.assert_allclose(normed[a:b], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_do_not_matter(family, monkeypatch):
    model, _ = tiny.pair(family)
    ids = random_ids(120)
    found = []
    for limit in (1, 70, 2048):  # chunks alone, two at a time, all together
        monkeypatch.setattr(score_module, "PASS_TOKENS", limit)
        found.append(Scorer(model, chunk_tokens=25, left_context=5).score(ids))
    for other in found[1:]:
        np.testing.assert_allclose(other.surprisal, found[0].surprisal, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.attention, found[0].attention, rtol=1e-5, atol=1e-6)


def test_without_context_a_chunks_first_token_takes_its_mean(llama):
    found = Scorer(llama, chunk_tokens=20, left_context=0).score(random_ids(60))
    assert len(found.chunks) == 3
    assert found.surprisal[0] == found.attention[0] == 0.0
    for a, b in found.chunks[1:]:
        assert found.surprisal[a] == pytest.approx(found.surprisal[a + 1 : b].mean())
        assert found.attention[a] == pytest.approx(found.attention[a + 1 : b].mean())


def test_a_bos_is_fed_and_never_reported(llama):
    ids = random_ids(30)
    bos = llama.config.bos_token_id
    alone = Scorer(llama, chunk_tokens=0).score([bos, *ids])
    found = Scorer(llama, chunk_tokens=0, prepend_bos=True).score(ids)
    np.testing.assert_allclose(found.surprisal, alone.surprisal[1:], atol=1e-6)
    np.testing.assert_allclose(found.attention, alone.attention[1:], rtol=1e-6)
    assert found.surprisal[0] > 0


def test_a_bos_stands_before_every_chunk(llama):
    ids = random_ids(60)
    found = Scorer(llama, chunk_tokens=20, left_context=0, prepend_bos=True).score(ids)
    for a, b in found.chunks:
        alone = Scorer(llama, chunk_tokens=0, prepend_bos=True).score(ids[a:b])
        np.testing.assert_allclose(found.surprisal[a:b], alone.surprisal, atol=1e-5)


def test_attention_is_left_out_when_not_asked_for(llama, monkeypatch):
    monkeypatch.setattr(score_module, "blocked_attention", None)
    found = Scorer(llama).score(random_ids(30), attention=False)
    assert found.attention is None
    assert (found.surprisal[1:] > 0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_texts_without_a_scored_token(llama, n):
    found = Scorer(llama).score(random_ids(n))
    assert found.surprisal.tolist() == found.attention.tolist() == [0.0] * n


def test_a_text_too_long_to_read_whole_is_refused(llama):
    with pytest.raises(ConfigError, match=r"600 tokens.* 512 .* set chunk_tokens to at most 448"):
        Scorer(llama, chunk_tokens=0).score(random_ids(600))
    with pytest.raises(ConfigError, match="left_context 512 leaves no room"):
        Scorer(llama, left_context=512)


def test_chunks_are_as_short_as_the_model_needs(llama):
    assert Scorer(llama).score(random_ids(512)).chunks == [(0, 512)]
    assert Scorer(llama).score(random_ids(600)).chunks == [(0, 300), (300, 600)]
    edge = Scorer(llama, chunk_tokens=512, left_context=0)
    assert edge.score(random_ids(1024)).chunks == [(0, 512), (512, 1024)]
    bos = Scorer(llama, chunk_tokens=512, left_context=0, prepend_bos=True)
    assert max(b - a for a, b in bos.score(random_ids(512)).chunks) <= 511


@pytest.mark.parametrize(
    "option",
    [{"chunk_tokens": -1}, {"left_context": -1}, {"block_rows": 0}, {"attn_norm": "mean"}],
)
def test_bad_options(llama, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        Scorer(llama, **option)


def test_a_model_without_bos_cannot_prepend_one():
    model = tiny.pair("llama", bos_token_id=None)[0]
    with pytest.raises(ConfigError, match="BOS"):
        Scorer(model, prepend_bos=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad):
    model, _ = tiny.pair.__wrapped__("llama")
    model.model.get_output_embeddings().weight[50:] = bad
    with pytest.raises(NumericalError, match="not finite"):
        Scorer(model).score(random_ids(20))


def test_half_precision_ranks_like_full():
    ids = random_ids(4096)
    changes = {"max_position_embeddings": 4096, "initializer_range": 0.1}
    full, half = (
        Scorer(tiny.pair("llama", dtype, **changes)[0], chunk_tokens=0).score(ids)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert np.isfinite(half.surprisal).all()
    for a, b in ((full.surprisal, half.surprisal), (full.attention, half.attention)):
        assert np.corrcoef(average_ranks(a), average_ranks(b))[0, 1] >= 0.99


def test_no_tensor_grows_with_the_square_of_the_text():
    """At 8,192 tokens the largest tensor is a block of weights, not a map or a text of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    n = 8192
    model, _ = tiny.pair("llama", max_position_embeddings=n, num_hidden_layers=1)
    with Watch():
        Scorer(model, chunk_tokens=0, block_rows=32).score(random_ids(n))
    block = 4 * 32 * n * 4
    assert block <= largest <= block + n * 256 * 4


def test_a_one_pass_layer_keeps_nothing():
    layer = OnePassLayer(None, None, 64)
    k = torch.randn(5, 2, 8)
    layer.append(k, k)
    layer.attend(torch.randn(5, 4, 8), 0.3)
    assert layer.length == 5
    assert layer.nbytes == 0
    for refused in (layer.materialize, lambda: layer.append(k, k), lambda: layer.rollback(1)):
        with pytest.raises(ValueError, match="one-pass"):
            refused()


class TestSplit:
    @pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 95, 1000])
    @pytest.mark.parametrize("limit", [0, 1, 10, 64])
    def test_covers_all_within_the_limit(self, n, limit):
        breaks = np.random.default_rng(n).choice([0, 1, 1, 2], n).astype(np.int8)
        for marks in (None, breaks):
            spans = split(n, marks, limit)
            assert [t for a, b in spans for t in range(a, b)] == list(range(n))
            assert all(0 < b - a <= (limit or n) for a, b in spans)

    def test_ends_at_a_sentence_near_the_limit(self):
        breaks = np.ones(300, np.int8)
        breaks[[40, 90, 101, 250]] = 2
        assert split(300, breaks, 110)[0] == (0, 102)

    def test_never_inside_a_unit_that_fits(self):
        breaks = np.zeros(100, np.int8)
        breaks[6::7] = 1
        breaks[-1] = 1
        for a, b in split(100, breaks, 30):
            assert breaks[b - 1], (a, b)

    def test_a_unit_longer_than_a_chunk_is_cut(self):
        assert max(b - a for a, b in split(100, np.zeros(100, np.int8), 30)) <= 30

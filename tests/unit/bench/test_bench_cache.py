import json

import numpy as np
import pytest
import torch

from narrows import cli
from narrows.bench import cache, cache_quality, cache_retrieval, metrics, prose, report
from narrows.bench.cache_peers import Peer, check_peers, load_stock, tensors
from narrows.bench.cache_subjects import Ours, native_bytes
from narrows.contracts import FlatBatch
from narrows.errors import ConfigError, InputError
from narrows.model.flat import FlatModel

CACHES = ["kivi:bits=4,value_group=32", "xquant:value_group=32"]
SIZES = {
    "windows": 3,
    "prefix": 320,
    "decoded": 6,
    "held": (320, 640),
    "retrieval": (256,),
    "depths": (0.2, 0.8),
    "probes": 2,
    "lengths": (256, 384),
    "rounds": 2,
    "steps": 2,
    "memory": 256,
}


def pick(rows, **where):
    return [r for r in rows if all(r.get(k) == v for k, v in where.items())]


def one(rows, **where):
    (found,) = pick(rows, **where)
    return found


@pytest.fixture(scope="session")
def model(wide):
    return FlatModel.load(wide, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def stock(wide, model):
    return load_stock(model, wide, "float32")


@pytest.fixture(scope="session")
def rows(wide, texts):
    return cache.run(
        model=wide,
        data=texts,
        caches=CACHES,
        peers=["transformers"],
        versus=["kivi:bits=4,value_group=32"],
        dtype="float32",
        show_progress=False,
        **SIZES,
    )


def test_rows_hold_every_part_for_every_subject_and_their_origin(rows):
    methods = {"dense", *CACHES, "transformers"}
    for part in cache.PARTS:
        assert {r["method"] for r in pick(rows, part=part)} == methods
    for r in rows:
        assert r["interval"][0] <= r["value"] <= r["interval"][1]
        assert {"unit", "n", "seed", "versions", "command", "engine", "dtype"} <= r.keys()
    json.dumps(rows)


def test_dense_caches_differ_from_nothing(rows):
    for method in ("dense", "transformers"):
        assert one(rows, method=method, metric="kl")["value"] == 0.0
        assert one(rows, method=method, metric="top1_agreement")["value"] == 1.0
    ours, theirs = (one(rows, method=m, metric="perplexity") for m in ("dense", "transformers"))
    assert ours["value"] == pytest.approx(theirs["value"], rel=1e-4)


def test_fewer_bits_lose_more_and_hold_less(rows):
    four, less = (one(rows, method=m, metric="kl") for m in CACHES)
    assert 0 < four["value"] < less["value"]
    assert four["nominal_bits"] == 4.0
    assert four["true_bits"] > less["true_bits"] > less["nominal_bits"]
    for m in CACHES:
        mean, tail = (one(rows, method=m, metric=k)["value"] for k in ("kl", "kl_p99"))
        assert mean < tail


def test_bytes_are_the_storages_and_bits_follow_from_them(rows):
    elements = 4 * 2 * 32
    for r in pick(rows, metric="held_bytes"):
        bits = one(rows, metric="true_bits", method=r["method"], length=r["length"])
        assert bits["value"] == pytest.approx(8 * r["value"] / (r["length"] * elements))
    exact = one(rows, metric="held_bytes", method="transformers", length=640)
    assert exact["value"] == 640 * elements * 4


def test_differences_are_those_of_the_means(rows):
    other = CACHES[0]
    for metric in ("kl", "top1_agreement"):
        gap = one(rows, metric=f"{metric}_difference", method=CACHES[1], versus=other)
        a, b = (one(rows, metric=metric, method=m)["value"] for m in (CACHES[1], other))
        assert gap["value"] == pytest.approx(a - b)
    assert not pick(rows, metric="kl_difference", method=other)


def test_advantages_are_relative_to_the_dense_cache_too(rows):
    for length in SIZES["lengths"]:
        found = pick(rows, metric="decode_step_advantage", length=length)
        assert {(r["method"], r["versus"]) for r in found} == {
            (a, b)
            for a in ("dense", *CACHES, "transformers")
            for b in ("dense", CACHES[0])
            if a != b
        }


def test_contexts_beyond_the_window_are_not_timed(wide):
    rows = cache.run(
        model=wide,
        caches=[],
        peers=["none"],
        parts=["time"],
        lengths=(256, 1020),
        rounds=1,
        steps=1,
        dtype="float32",
        show_progress=False,
    )
    assert {r["length"] for r in rows} == {256}


def test_decoding_goes_through_what_is_held(model, texts):
    """Predictions after the prompt equal those of a cache told to compress there, and differ
    from one full pass."""
    window = cache_quality.read_text(texts, model, windows=1, prefix=320, decoded=4, seed=0)[0]
    subject = Ours(model, CACHES[1])
    reader = subject.read(window.prefix)
    steps = [subject.step([reader], [t]) for t in window.decoded[:-1]]
    caches = subject.policy.build(model.shape)
    ids = torch.tensor(window.prefix + window.decoded[:-1])
    whole = model.logits(
        model.hidden(ids, torch.arange(len(ids)), FlatBatch([(0, len(ids))], [caches]))
    )[-4:]
    assert (torch.cat(steps) - whole).abs().max() > 1e-3
    dense = Ours(model, "dense")
    reader = dense.read(window.prefix)
    for tokens, wanted in zip(window.decoded, whole, strict=False):
        assert torch.allclose(dense.step([reader], [tokens])[0], wanted, atol=1e-3)


def test_readers_side_by_side_are_as_alone(model, texts):
    windows = cache_quality.read_text(texts, model, windows=3, prefix=320, decoded=3, seed=0)
    for spec in ("dense", CACHES[1]):
        subject = Ours(model, spec)
        together = [subject.read(w.prefix) for w in windows]
        for number in range(3):
            many = subject.step(together, [w.decoded[number] for w in windows])
        for reader, window in enumerate(windows):
            alone = subject.read(window.prefix)
            for token in window.decoded[:3]:
                single = subject.step([alone], [token])
            assert torch.allclose(many[reader], single[0], atol=1e-4)


def test_random_filling_holds_as_much_as_a_prompt(model, stock):
    for subject in (Ours(model, CACHES[1]), Peer(stock, model.shape, "transformers")):
        prompt = [5 + i % 300 for i in range(384)]
        assert subject.held(subject.fill(384, seed=1)) == subject.held(subject.read(prompt))


# ---------------------------------------------------------------------------------------- parts


def test_comparison_of_logits_by_hand():
    dense = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    given = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    kl, agrees, nll = cache_quality.compare(dense, given, torch.tensor([1, 0]))
    p, q = torch.softmax(dense[1], 0), torch.softmax(given[1], 0)
    assert kl.tolist() == pytest.approx([0.0, float((p * (p / q).log()).sum())], abs=1e-6)
    assert agrees.tolist() == [1.0, 0.0]
    assert nll.tolist() == pytest.approx([np.log(2), -float(q[0].log())])


def test_windows_come_from_different_texts_of_both_sources(model, texts):
    windows = prose.read_windows(texts, model, 6, 300, seed=3)
    assert [len(w) for w in windows] == [300] * 6
    assert len({tuple(w) for w in windows}) == 6
    assert windows == prose.read_windows(texts, model, 6, 300, seed=3)
    assert windows != prose.read_windows(texts, model, 6, 300, seed=4)
    with pytest.raises(InputError, match="only 8 texts"):
        prose.read_windows(texts, model, 9, 300)
    assert len(prose.read_windows(texts, model, 9, 300, least=8)) == 8


def test_probes_have_their_length_and_hold_their_fact(model, texts):
    probes = cache_retrieval.make_probes(
        texts, model, lengths=[256, 300], depths=[0.0, 0.5, 1.0], count=2, seed=0
    )
    assert len(probes) == 2 * 3 * 2 * 2
    decode = model.tokenizer.decode
    for p in probes:
        assert len(p.context) == p.length
        text, question, answer = decode(p.context), decode(p.question), decode(p.answer)
        assert question.strip() + answer in text
        assert len(p.question) + len(p.answer) <= cache_retrieval.LONGEST
        place = text.index(question.strip() + answer) / len(text)
        assert abs(place - p.depth) < 0.25


class Parrot:
    """Predicts, for every reader, the token that follows in its own script."""

    engine = method = "parrot"

    def __init__(self, scripts, wrong=()):
        self.scripts, self.wrong = scripts, wrong

    def read(self, prompt):
        return [self.scripts[tuple(prompt)], 0]

    def step(self, readers, tokens):
        logits = torch.zeros(len(readers), 400)
        for i, (reader, token) in enumerate(zip(readers, tokens, strict=True)):
            script, at = reader
            assert script[at] == token
            reader[1] += 1
            if at + 1 < len(script) and at not in self.wrong:
                logits[i, script[at + 1]] = 50.0
        return logits


def test_only_the_tokens_of_the_answer_count():
    made = [([1, 2], [7, 8], [9]), ([3, 4], [7], [8, 9, 10])]
    probes = [cache_retrieval.Probe("t", 2, 0.5, "g", *parts) for parts in made]
    scripts = {tuple(p.context): p.question + p.answer for p in probes}
    good = cache_retrieval.ask(Parrot(scripts), probes)
    assert [f.exact for f in good] == [True, True]
    assert [f.nll for f in good] == pytest.approx([0.0, 0.0], abs=1e-9)
    # Position 0 predicts question text in the first and the answer's start in the second.
    bad = cache_retrieval.ask(Parrot(scripts, wrong=[0]), probes)
    assert [f.exact for f in bad] == [True, False]
    assert bad[1].nll == pytest.approx(np.log(400) / 3)


def test_quantile_interval_draws_groups_whole():
    values = [0.0] * 50 + [1.0] * 50
    groups = ["a"] * 50 + ["b"] * 50
    assert metrics.bootstrap_quantile(values, 0.5, groups) == (0.0, 1.0)
    low, high = metrics.bootstrap_quantile(list(range(1000)), 0.9)
    assert low < 899 < high
    assert high - low < 80
    assert all(np.isnan(metrics.bootstrap_quantile([], 0.5)))


# ---------------------------------------------------------------------------------------- peers


@pytest.fixture(scope="session")
def quantised():
    try:
        check_peers(["quanto2", "hqq2"])
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "bits"), [("quanto4", 4), ("quanto2", 2), ("hqq2", 2)])
def test_a_peer_holds_codes_scales_and_residual(quantised, stock, model, name, bits):
    subject = Peer(stock, model.shape, name)
    reader = subject.read([5 + i % 300 for i in range(256)])
    elements, size = 4 * 2 * 32, 4
    packed = 256 * elements * bits // 8
    scales = 2 * 256 * elements // 64 * size
    assert subject.held(reader) == packed + scales
    subject.step([reader], [7])
    assert subject.held(reader) == packed + scales + elements * size
    assert subject.nominal_bits == bits


def test_a_peer_predicts_from_its_codes(quantised, stock, model):
    prompt = [5 + i % 300 for i in range(256)]
    dense, four, two = (
        (subject := Peer(stock, model.shape, name)).step([subject.read(prompt)], [7])
        for name in ("transformers", "quanto4", "quanto2")
    )
    truth = torch.tensor([3])
    near, far = (float(cache_quality.compare(dense, x, truth)[0]) for x in (four, two))
    assert 0 < near < far


def test_a_prompt_that_a_peer_cannot_pack_is_refused(quantised, stock, model):
    with pytest.raises(ConfigError, match="hqq2 cannot take a prompt of 255 tokens"):
        Peer(stock, model.shape, "hqq2").read([5] * 255)


def test_tensors_are_found_once_in_whatever_holds_them():
    class Box:
        pass

    box, a, b = Box(), torch.ones(2), torch.ones(3)
    box.parts = {"a": a, "more": [b, (a, box)]}
    box.kind = Box
    assert [t.numel() for t in tensors([box, box])] == [2, 3]


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("narrows.bench.cache_peers._installed", lambda package: False)
    with pytest.raises(ConfigError, match=r"quanto need optimum.quanto: pip install"):
        check_peers(["quanto2"])
    check_peers(["transformers"])


# -------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "wrong",
    [
        {"parts": ["speed"]},
        {"parts": []},
        {"peers": ["llama"]},
        {"rounds": 0},
        {"steps": 0},
        {"held": [0]},
        {"caches": ["kivi:bits=3"]},
        {"caches": ["nothing"]},
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(wrong, texts):
    options = {"peers": [], "caches": [], **wrong}
    with pytest.raises(ConfigError):
        cache.run(model="/nowhere", data=texts, show_progress=False, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"windows": 0},
        {"prefix": 1020, "decoded": 8},
        {"retrieval": [1000]},
        {"retrieval": []},
        {"depths": [1.5]},
        {"probes": 0},
        {"versus": ["kivi"]},
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_measuring(wrong, wide, texts):
    options = {**SIZES, "peers": [], "caches": [], **wrong}
    with pytest.raises(ConfigError):
        cache.run(model=wide, data=texts, dtype="float32", show_progress=False, **options)


def test_specs_are_measured_once_and_dense_first():
    assert cache._specs(["kivi", "dense", "kivi:bits=2"]) == ["dense", "kivi"]


def test_the_picture_has_a_point_for_each_lossy_cache(rows, tmp_path):
    points = cache.points(rows)
    assert [p["method"] for p in points] == CACHES
    path = tmp_path / "pareto.png"
    report.draw_points(points, path, x="true_bits")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no rows to draw"):
        report.draw_points([], path, x="true_bits")
    with pytest.raises(InputError, match="cannot write"):
        report.draw_points(points, tmp_path / "no" / "file.png", x="true_bits")


def test_the_command_writes_rows_and_a_picture(wide, texts, tmp_path, capsys):
    out, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    words = ["bench", "cache", "--quick", "-m", wide, "--data", str(texts), "--peer", "none"]
    words += ["--cache", CACHES[1], "--json", str(out), "--plot", str(plot)]
    with pytest.raises(SystemExit) as done:
        cli.app(words)
    assert done.value.code == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["part"] for r in found} == set(cache.PARTS)
    assert plot.exists()
    printed = capsys.readouterr().out
    assert all(part in printed for part in cache.PARTS)


def test_tables_have_a_line_a_method_and_a_column_a_measure(rows):
    tables = {t.title: t for t in report.tables(rows)}
    assert {*cache.PARTS, f"quality, versus {CACHES[0]}", "time, versus dense"} <= set(tables)
    names = [c.header for c in tables["bytes"].columns]
    assert names[0] == "method"
    assert "true_bits (bits/element), length 640" in names
    assert list(tables["bytes"].columns[0].cells) == ["dense", *CACHES, "transformers"]
    means = [c.header for c in tables["retrieval"].columns[1:]]
    assert means == [
        f"answer_{m}, task {t}"
        for t in cache_retrieval.TASKS
        for m in ("nll (nats/token)", "exact (share)")
    ]


def test_a_share_of_bytes_is_a_budget_for_each_prompt(model):
    subject = Ours(model, "h2o@0.5")
    assert subject.method == "h2o@0.5"
    for tokens in (256, 512):
        reader = subject.read([(7 * i) % 400 for i in range(tokens)])
        share = subject.held(reader) / native_bytes(model.shape, tokens)
        assert 0.35 < share <= 0.5
    assert torch.isfinite(subject.step([reader], [3])).all()
    filled = subject.fill(256, seed=1)
    assert filled[0].length == 256
    assert subject.held(filled) <= native_bytes(model.shape, 256) / 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dense@0.5", "only an evicting cache"),
        ("snapkv@2", "above 0 and at most 1"),
        ("snapkv@half", "above 0 and at most 1"),
    ],
)
def test_bad_shares_are_refused(model, spec, message):
    with pytest.raises(ConfigError, match=message):
        Ours(model, spec)


def test_a_visible_question_is_part_of_the_prompt():
    probe = cache_retrieval.Probe("t", 2, 0.5, "g", [1, 2], [3, 4, 5], [6])
    seen = cache_retrieval.visible(probe)
    assert (seen.context, seen.question, seen.answer) == ([1, 2, 3, 4], [5], [6])


def test_both_questions_are_told_apart(wide, texts):
    rows = cache.run(
        model=wide,
        data=texts,
        caches=["evict:window=4@0.6"],
        peers=[],
        parts=["retrieval"],
        questions=["hidden", "visible"],
        dtype="float32",
        show_progress=False,
        **SIZES,
    )
    for question in ("hidden", "visible"):
        found = pick(rows, question=question, metric="answer_nll", depth=None)
        assert {r["method"] for r in found} == {"dense", "evict:window=4@0.6"}
    dense = [one(rows, question=q, metric="answer_nll", depth=None, method="dense", task="needle")
             for q in ("hidden", "visible")]  # fmt: skip
    assert dense[0]["value"] == pytest.approx(dense[1]["value"], rel=1e-3)
    with pytest.raises(ConfigError, match="questions: give some of hidden, visible"):
        cache.run(model=wide, data=texts, questions=["shown"], parts=["bytes"], peers=[])


def test_evicting_and_coded_can_be_filled(model):
    subject = Ours(model, "evict:keep=0.5,window=8+kivi:value_group=32")
    reader = subject.fill(256, seed=0)
    assert reader[0].length == 256
    assert torch.isfinite(subject.step([reader], [3])).all()

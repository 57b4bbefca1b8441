"""The drafters that come with the package belong to their models and are whole."""

from __future__ import annotations

import pytest

from narrows.draft.phrases import Phrases
from narrows.draft.specformer import SpecFormer
from narrows.draft.specformer_drafter import SpecFormerDrafter
from narrows.draft.specs import SHIPPED, make_drafter
from narrows.errors import ConfigError
from narrows.model.flat import FlatModel
from narrows.model.saved import CONFIG
from tiny import pair

FOLDERS = [path.parent for path in SHIPPED.glob(f"*/{CONFIG}")]


def test_all_are_whole_and_have_a_card():
    assert FOLDERS
    for folder in FOLDERS:
        assert SpecFormer.load(folder).config.fingerprint == Phrases.load(folder).fingerprint
        assert (folder / "README.md").exists()
        assert sum(p.stat().st_size for p in folder.iterdir()) < 25e6


@pytest.mark.model
def test_the_default_model_has_one(smollm: FlatModel):
    assert isinstance(make_drafter("shipped", smollm), SpecFormerDrafter)
    assert make_drafter("shipped:recent=7", smollm).recent == 7
    assert make_drafter("auto", smollm).name == "lookup+phrases+specformer"


def test_a_model_without_one_says_so():
    with pytest.raises(ConfigError, match="no drafter is shipped"):
        make_drafter("shipped", pair("llama")[0])

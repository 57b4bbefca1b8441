"""What every test may use. Being here, it also puts ``tests`` on the path: ``import oracles``.

Imports of the package wait for the fixture that needs them, so a test without a model does not
pay for loading transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch

    from narrows.model.flat import FlatModel

# Triton kernels are tested without a GPU; Triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shared machine may be slow at any moment; no test of ours is about wall-clock time.
settings.register_profile("narrows", deadline=None)
settings.load_profile("narrows")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The benchmark data, or a skip with the reason."""
    from narrows import data
    from narrows.errors import InputError

    try:
        return data.locate().resolve()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _data_is_here(request: pytest.FixtureRequest) -> None:
    """A test marked ``data`` is skipped where there is none, whether or not it asks for it."""
    if request.node.get_closest_marker("data"):
        request.getfixturevalue("data_folder")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], tuple[FlatModel, torch.nn.Module]]:
    """``tiny_model(family)``: a random float32 FlatModel without a tokenizer, and a stock
    transformers model with the same weights. See ``tiny``."""
    import tiny

    return tiny.pair


@pytest.fixture(scope="session")
def smollm() -> FlatModel:
    """The default model in float32, or a skip with the reason; for tests marked ``model``."""
    from narrows.errors import ModelError
    from narrows.model.flat import FlatModel

    try:
        return FlatModel.load("smollm2-135m", dtype="float32")
    except ModelError as error:
        pytest.skip(str(error))

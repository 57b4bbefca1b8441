"""Reading a local folder with transformers: quietly, and with failures as one clear line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from narrows.errors import ModelError, reason


def from_folder(auto: Any, folder: Path, **options: Any) -> Any:
    """``auto.from_pretrained`` of a local ``folder``, never asking a hub. Raises ModelError."""
    try:
        with quiet():
            return auto.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        raise ModelError(f"cannot read the model in {folder}: {reason(error)}") from error


def weights_from_folder(auto: Any, folder: Path, *, more: bool = False, **options: Any) -> Any:
    """``from_folder`` for a model: every weight of its config must be in the safetensors files,
    in its shape, and, unless ``more`` may be there, nothing else; transformers would fill a gap
    with random numbers."""
    model, found = from_folder(
        auto, folder, use_safetensors=True, output_loading_info=True, **options
    )
    for kind in ("missing_keys", "mismatched_keys", *([] if more else ["unexpected_keys"])):
        if names := sorted(str(name) for name in found.get(kind) or ()):
            raise ModelError(
                f"the weights in {folder} do not belong to its config.json: {len(names)} "
                f"{kind.replace('_', ' ')}, such as {names[0]}"
            )
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the libraries' progress bars and remarks; put everything back afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # one bar there ignores the setting
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

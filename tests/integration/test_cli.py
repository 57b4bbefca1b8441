"""The command line end to end on a tiny model, and every error as one line with code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from narrows.config import SamplingParams
from narrows.llm import LLM
from narrows.model.flat import FlatModel
from tiny_text import chat_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    lines = [f"On day {i} the crew of ship {i * 7} counted {i * 3} barrels.\n\n" for i in range(80)]
    path.write_text("".join(lines))
    return str(path)


@pytest.mark.parametrize("method", ["rank", "dac", "rank+dac", "head", "rank+random"])
def test_ask_fits_the_budget_and_reports(run: Run, book: str, method: str) -> None:
    code, out, _ = run(
        *("ask", "--doc", book, "--budget", "60", "-n", "4", "--method", method, "--json"),
        "How many barrels on day 41?",
    )
    assert code == 0
    answer = json.loads(out)
    saved = answer["savings"]
    assert saved["document_tokens"] > 500
    assert 0 < saved["kept_tokens"] <= 66  # a splice can cost a token or two more
    assert saved["cache_bytes"] < saved["full_cache_bytes"]
    assert {"read", "prefill", "decode"} <= set(saved["seconds"])
    text = Path(book).read_text()
    for source in answer["sources"]:
        assert text[slice(*source["span"])].strip()
    if method.startswith("rank"):
        assert any("day 41" in text[slice(*s["span"])] for s in answer["sources"])


def test_ask_streams_what_json_gives_and_prints_savings(run: Run, book: str) -> None:
    options = ("--doc", book, "--budget", "50", "-n", "6", "What happened?")
    _, streamed, savings = run("ask", *options)
    _, whole, _ = run("ask", *options, "--json")
    assert streamed.strip() == json.loads(whole)["text"]
    for word in ("tokens", "cache", "seconds", "speed"):
        assert word in savings


def test_a_text_that_fits_is_not_touched(run: Run) -> None:
    code, out, _ = run("ask", "--doc", "-", "-n", "2", "--json", "Why?", stdin="A short text.")
    assert code == 0
    saved = json.loads(out)["savings"]
    assert saved["kept_tokens"] == saved["document_tokens"]
    assert "rank" not in saved["seconds"]


def test_compress_keeps_bytes_at_one_and_the_budget_below(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("Eins, zwei.\r\n日本 👩‍👩‍👧\tdrei\n".encode())
    _, out, _ = run("compress", str(path), "--keep", "1.0")
    assert out.encode() == path.read_bytes()
    _, out, _ = run("compress", str(path), "--target-tokens", "9", "--json")
    result = json.loads(out)
    assert result["tokens"] <= 9
    assert "\ufffd" not in result["text"]


def test_compress_takes_chat_messages(run: Run) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A long story about a ship and its crew. " * 5},
        {"role": "user", "content": "Who was it?"},
    ]
    code, out, _ = run("compress", "--chat", "--keep", "0.5", stdin=json.dumps(messages))
    assert code == 0
    shorter = json.loads(out)
    assert [m["role"] for m in shorter] == ["system", "user", "user"]
    assert shorter[0] == messages[0]
    assert shorter[2] == messages[2]
    assert len(shorter[1]["content"]) < len(messages[1]["content"])


def test_generate_and_chat_write_something(run: Run) -> None:
    code, out, _ = run("generate", "Once", "-n", "5", "--json")
    assert code == 0
    assert len(json.loads(out)["token_ids"]) <= 5
    code, out, _ = run("chat", "-n", "3", stdin="hello\nagain\n\n")
    assert code == 0
    assert out.count("\n") >= 2


def test_models_lists_the_catalogue(run: Run) -> None:
    code, out, _ = run("models")
    assert code == 0
    assert "smollm2-135m" in out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["ask", "", "--doc", "BOOK"], "question is empty"),
        (["ask", "why", "--doc", "missing.txt"], "missing.txt"),
        (["ask", "why", "--doc", "."], "directory"),
        (["ask", "why"], "no document"),
        (["ask", "why", "--doc", "BOOK", "--budget", "0"], "budget"),
        (["ask", "why", "--doc", "BOOK", "--budget", "50", "--method", "none"], "method"),
        (["ask", "why", "--doc", "BOOK", "--budget", "50", "--method", "dack"], "dac"),
        (["ask", "why", "--doc", "BOOK", "--budget", "50", "--ranker", "x"], "bm25"),
        (["ask", "why", "--doc", "BOOK", "-n", "100000"], "room"),
        (["ask", "why", "--doc", "BOOK", "--temperature", "-1"], "temperature"),
        (["ask", "why " * 400, "--doc", "BOOK"], "room"),
        (["compress", "BOOK"], "exactly one"),
        (["compress", "BOOK", "--keep", "1.5"], "keep_ratio"),
        (["compress", "BOOK", "--keep", "0.5", "--method", "zip"], "known"),
        (["compress", "BOOK", "--target-tokens", "5", "--protect", "@digits"], "protect"),
        (["compress", "BOOK", "--chat", "--keep", "0.5"], "not JSON"),
        (["generate", ""], "empty"),
        (["generate", "word " * 3000], "shorten"),
        (["generate", "x", "--cache", "dens"], "dense"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run: Run, book: str, arguments: list[str], hint: str
) -> None:
    code, out, err = run(*[book if a == "BOOK" else a for a in arguments])
    assert code == 2
    assert out == ""
    assert err.startswith("narrows: error: ")
    assert err.count("\n") == 1
    assert hint in err


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("narrows.pipeline.RESERVED", 256)
    path = tmp_path / "short.txt"
    path.write_text("On day 3 the crew counted 9 barrels. " * 5)
    return str(path)


@pytest.mark.parametrize("spec", ["dense", "spindle:preset=tuned,keep=0.5", "snapkv:window=8"])
def test_documents_read_once_are_asked_again_and_again(
    run: Run, short: str, tmp_path: Path, spec: str
) -> None:
    file = str(tmp_path / "short.cache")
    code, _, err = run("cache", "save", file, "--doc", short, "--cache", spec)
    assert code == 0
    assert "tokens" in err
    code, out, _ = run("cache", "load", file)
    assert code == 0
    told = json.loads(out)
    code, out, _ = run("cache", "load", file, "How many?", "Which day?", "-n", "3", "--json")
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["question"] for a in answers] == ["How many?", "Which day?"]
    for answer in answers:
        assert answer["savings"]["document_tokens"] == told["tokens"]
        assert answer["savings"]["prompt_tokens"] > told["tokens"]
    if spec == "dense":  # the same prompt as asking at once, cut where the question begins
        code, out, _ = run("ask", "--doc", short, "-n", "3", "--json", "How many?")
        assert json.loads(out)["savings"]["prompt_tokens"] == pytest.approx(
            answers[0]["savings"]["prompt_tokens"], abs=2
        )


def test_a_template_that_trims_messages_loses_no_question(
    run: Run, short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chat_model()
    trims = model.tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    monkeypatch.setattr(model.tokenizer, "chat_template", trims)
    monkeypatch.setattr(FlatModel, "load", classmethod(lambda *a, **k: model))
    file = str(tmp_path / "a.cache")
    assert run("cache", "save", file, "--doc", short)[0] == 0
    code, out, _ = run("cache", "load", file, "How many?", "-n", "2", "--json")
    assert code == 0
    assert json.loads(out)["savings"]["answer_tokens"] == 2


def test_saved_caches_refuse_bad_input(run: Run, short: str, book: str, tmp_path: Path) -> None:
    file = tmp_path / "a.cache"
    for arguments, message in [
        (("save", str(file), "--doc", book), "but 256 fit; give a compression method"),
        (("save", str(file), "--doc", short, "--cache", "snapkv:keep=2"), "keep: "),
        (("save", str(tmp_path / "no" / "a"), "--doc", short), "cannot write"),
        (("save", str(tmp_path), "--doc", short), "no ordinary file"),
        (("save", str(Path(short) / "a"), "--doc", short), "cannot write"),
        (("save", str(file), "--doc", "none.txt"), "none.txt"),
        (("load", str(file), "Why?"), "no such file"),
        (("load", short, "Why?"), "not a saved cache"),
    ]:
        code, _, err = run("cache", *arguments)
        assert code == 2, arguments
        assert message in err
        assert "Traceback" not in err
    assert not file.exists()
    code, _, _ = run("cache", "save", str(file), "--doc", book, "--method", "head")
    assert code == 0
    code, _, err = run("cache", "load", str(file), " ")
    assert code == 2
    assert "the question is empty" in err


def test_streams_at_the_same_time_lose_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatModel, "load", classmethod(lambda *a, **k: chat_model()))
    llm = LLM(max_sequences=2)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    alone = ["".join(llm.stream(prompt, params)) for prompt in ("one day", "two ships")]
    requests = [llm.submit(prompt, params) for prompt in ("one day", "two ships")]
    assert ["".join(llm.follow(request)) for request in requests] == alone
    both = [llm.stream(prompt, params) for prompt in ("one day", "two ships")]
    told = [""] * 2
    for number in (0, 1) * 30:
        told[number] += next(both[number], "")
    assert told == alone


def test_a_request_that_cannot_begin_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatModel, "load", classmethod(lambda *a, **k: chat_model()))
    llm = LLM()
    build = llm.engine.scheduler.build
    bad, good = (llm.submit("one day", SamplingParams(max_tokens=4)) for _ in range(2))

    def fails() -> None:
        raise MemoryError

    monkeypatch.setattr(llm.engine.scheduler, "build", fails)
    with pytest.raises(MemoryError):
        llm.engine.step()
    monkeypatch.setattr(llm.engine.scheduler, "build", build)
    assert list(llm.follow(bad)) == []
    assert "".join(llm.follow(good)) == good.completion().text
    assert not llm.engine.busy

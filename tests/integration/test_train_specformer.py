"""Training a drafter from the command line, then drafting with it."""

from __future__ import annotations

import json

SMALL = ["--steps=2", "--answer-tokens=8", "--batch-tokens=100", "--slots=2", "--save-every=1"]


def test_a_drafter_from_the_command_line(run, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "drafter"
    rows = [{"prompt": f"Question {i}?", "answer": "An answer of some length."} for i in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "specformer", "--prompts", str(prompts), *SMALL, "--dtype=float32"]
    code, told, _ = run(*train, "--out", str(out))
    assert code == 0
    assert "tokens a step on held-out answers" in told
    assert (out / "curves.png").stat().st_size > 1000
    code, text, _ = run("generate", "Once", "-n", "8", "--draft", str(out), "--dtype", "float32")
    assert code == 0
    assert text == run("generate", "Once", "-n", "8", "--draft", "none", "--dtype", "float32")[1]

    # Phrases are counted in the same answers, of which none is given again.
    parts = {path: path.stat().st_mtime_ns for path in out.glob("work/answers/*")}
    count = ["train", "phrases", "--prompts", str(prompts), "--dtype=float32"]
    code, told, _ = run(*count, "--answer-tokens=8", "--out", str(out))
    assert code == 0
    assert " phrases; for " in told
    assert parts == {path: path.stat().st_mtime_ns for path in out.glob("work/answers/*")}
    both = f"phrases:folder={out}+{out}"
    assert run("generate", "Once", "-n", "8", "--draft", both, "--dtype", "float32")[1] == text
    code, _, complaint = run(*count, "--answer-tokens=9", "--out", str(out))
    assert code == 2
    assert "another folder" in complaint

    # The control learns from the answers in the file, and is measured on the model's own.
    control = tmp_path / "control"
    code, told, _ = run(*train, "--given", "--out", str(control))
    assert code == 0
    assert "tokens a step on held-out answers" in told
    same = [(folder / "specformer.safetensors").read_bytes() for folder in (out, control)]
    assert same[0] != same[1]
    # Neither goes on with what the other began.
    code, _, complaint = run(*train, "--out", str(control))
    assert code == 2
    assert "another folder" in complaint

    code, _, complaint = run("train", "specformer", "--given", "--out", str(tmp_path / "x"))
    assert code == 2
    assert "--given needs --prompts" in complaint
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    code, _, complaint = run(*train, "--given", "--out", str(tmp_path / "x"))
    assert code == 2
    assert "row 1: no answer" in complaint
    assert not (tmp_path / "x").exists()

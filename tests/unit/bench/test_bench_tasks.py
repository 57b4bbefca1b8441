import gzip
import os
from pathlib import Path

import pytest

from narrows import data
from narrows.bench import tasks
from narrows.errors import ConfigError, InputError

FOLDER = Path(os.environ.get("NARROWS_DATA", "../shared/data"))


def test_gsm8k_context_is_seeded_shared_and_free_of_calculator_marks(folder):
    items = tasks.gsm8k(folder, seed=1, shots=3, contexts=2)
    assert [i.context for i in items] == [
        i.context for i in tasks.gsm8k(folder, seed=1, shots=3, contexts=2)
    ]
    assert items[0].context != tasks.gsm8k(folder, seed=2, shots=3, contexts=2)[0].context
    assert len({i.context for i in items}) == len({i.group for i in items}) == 2
    assert items[0].context.count("Question:") == 3
    assert "<<" not in items[0].prompt() + items[0].gold
    assert items[0].question in items[0].prompt("")
    assert items[0].score("So 101.\n#### 101") == 1.0
    assert items[0].score("#### 102") == 0.0


def test_longbench_prompt_fills_the_template_and_only_it(folder):
    items = tasks.longbench(folder, limit=1)
    assert len(items) == len(tasks.LONGBENCH)
    item = items[0]
    assert item.prompt() == "Read {braces}.\nAnna {x} lives in Rome.\nQuestion: Where?\nAnswer:"
    assert item.gold == " Rome"
    assert item.score("Rome") == 1.0


def test_survival_asks_only_what_stood_in_the_context(folder):
    item = tasks.longbench(folder, limit=1)[0]
    assert item.survives("lives Rome") is True
    assert item.survives("Anna lives") is False
    assert tasks.gsm8k(folder)[0].survives("anything") is None


def test_lost_in_the_middle_moves_the_gold_passage(folder):
    items = tasks.lost_in_the_middle(folder, passages=5)
    places = [i.context.split("\n").index("Document (Title: G) Wilhelm did.") for i in items]
    assert places == [0, 1, 2]
    assert all(i.context.count("Document (Title:") == 5 for i in items)


def test_key_value_and_needle_hold_their_answer(folder):
    assert tasks.key_value(folder)[0].survives("c: d-e") is True
    items = tasks.needle(folder, characters=500)
    assert len(items) == 20
    assert all(i.survives(i.context) for i in items)
    assert items == tasks.needle(folder, characters=500)
    depths = [i.context.index("The secret number") for i in items[:10]]
    assert min(depths) < 50
    assert max(depths) > 400


def test_unknown_task_and_bad_limit_are_refused(folder):
    with pytest.raises(ConfigError, match="known: gsm8k"):
        tasks.load("gsm9k", folder)
    with pytest.raises(ConfigError, match="limit"):
        tasks.load("gsm8k", folder, limit=0)


def test_a_missing_field_names_itself(folder):
    (folder / "gsm8k/test.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(InputError, match="'question'"):
        tasks.load("gsm8k", folder)


def test_data_folder_by_option_variable_or_neighbour(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("NARROWS_DATA", str(folder))
    assert data.locate() == folder
    assert data.locate(tmp_path) == tmp_path
    monkeypatch.setenv("NARROWS_DATA", str(tmp_path / "none"))
    with pytest.raises(InputError, match="--data"):
        data.locate()
    monkeypatch.delenv("NARROWS_DATA")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="NARROWS_DATA"):
        data.locate()
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert data.locate() == Path("../shared/data")


def test_bad_files_name_the_line(tmp_path):
    bad = tmp_path / "x.jsonl"
    bad.write_text('{"a": 1}\n{oops\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        list(data.read_rows(bad))
    bad.write_text("[1]\n")
    with pytest.raises(InputError, match="not a JSON object"):
        list(data.read_rows(bad))
    cut = tmp_path / "y.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(InputError, match="cannot read"):
        list(data.read_rows(cut))
    with pytest.raises(InputError, match=r"has no z\.jsonl"):
        data.find(tmp_path, "z")


@pytest.mark.data
@pytest.mark.skipif(not FOLDER.is_dir(), reason="no benchmark data (set NARROWS_DATA)")
@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_real_data_loads(name):
    items = tasks.load(name, FOLDER, limit=2)
    assert items
    assert len({i.id for i in items}) == len(items)
    assert all(i.context and i.gold.strip() and i.answers for i in items)
    assert all(i.score(i.answers[0]) == 1.0 for i in items)

"""What bench listen measures, on clips whose right answers are known."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from narrows.bench import listen, listen_answers, listen_cost, spoken
from narrows.bench.listen_find import Hearing, find_rows, gap_rows, share_rows, word_rows
from narrows.bench.spoken import Spoken, digits, human, noisy, synthetic
from narrows.errors import ConfigError, InputError
from narrows.retrieve.audio import RATE, seconds_of
from narrows.retrieve.hearing import Heard
from tiny_ear import WORDS, Ear, instead_of_models, talk

needs_voices = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="the voices are not installed"
)
KINDS = list(WORDS.values())


def clip(word, questions=(), *, voice="a", seconds=1.0, article="x", text=None):
    asked = tuple((question, (word,)) for question in questions)
    wave = talk(word, pause=0.0)[: int(seconds * RATE)]
    return Spoken(text or f"the {word}", voice, article, asked, wave)


def pick(rows, **where):
    return [r for r in rows if all(r.get(k) == v for k, v in where.items())]


@pytest.fixture
def clips():
    return [
        clip("harbour", ["is there a harbour", "what harbour"], article="one"),
        clip("bridge", ["whose bridge"], voice="b", article="two"),
        clip("bread", ["which bread"], article="three", seconds=0.5),
    ]


@pytest.fixture
def hearing(clips):
    ear = Ear()
    return Hearing("ear", clips, ear.hear([c.wave for c in clips]), ear.embed)


def test_what_hears_everything_finds_everything_both_ways(hearing):
    found = hearing.clips_of_questions()
    assert [f.method for f in found] == ["ear fused", "ear vectors", "ear words"]
    assert all(f.ranks == [1.0] * 4 and f.size == 3 for f in found)
    back = hearing.questions_of_clips()
    assert all(f.direction == "clip" and f.ranks == [1.0] * 3 for f in back)
    rows = find_rows(found, seed=0, model="m", noise="none")
    (row,) = pick(rows, method="ear fused", metric="recall@1", voice="b")
    assert (row["value"], row["n"], row["size"]) == (1.0, 1, 3)
    assert {r["length"] for r in rows if "length" in r} == {"0 to 6 s"}


def test_a_wrong_word_is_a_wrong_clip(clips):
    """The control: clips heard in another order are found by nobody."""
    ear = Ear()
    heard = ear.hear([c.wave for c in clips])
    wrong = Hearing("wrong", clips, heard[1:] + heard[:1], ear.embed)
    right = Hearing("right", clips, heard, ear.embed)
    found = [f for h in (right, wrong) for f in h.clips_of_questions() if "vectors" in f.method]
    assert all(rank > 1 for rank in found[1].ranks)
    (all_of_it, *parts) = gap_rows(found, "right vectors", seed=0, model="m", noise="none")
    assert (all_of_it["value"], all_of_it["interval"]) == (-1.0, [-1.0, -1.0])
    assert all_of_it["versus"] == "right vectors"
    assert {r.get("voice") or r["length"] for r in parts} == {"a", "b", "0 to 6 s"}


def test_clips_are_ranked_again_by_what_another_made_of_them(clips):
    ear = Ear()
    heard = ear.hear([c.wave for c in clips])
    right = Hearing("right", clips, heard, ear.embed)
    wrong = Hearing("wrong", clips, heard[1:] + heard[:1], ear.embed)
    first, second, all_three = (wrong.reranked(right, count) for count in (1, 2, 3))
    assert all_three.method == "wrong fused, 3 by right"
    assert all_three.ranks == [1.0] * 4
    assert first.ranks == [math.inf] * 4  # the right clip is not among those looked at again
    assert set(second.ranks) <= {1.0, math.inf}


def test_what_was_not_heard_is_not_found(clips):
    nothing = Heard("", np.zeros(0, np.int32), np.zeros(len(KINDS), np.float32))
    ear = Ear()
    deaf = Hearing("deaf", clips, [nothing] * 3, ear.embed)
    assert deaf.modes == ("vectors",)
    for found in (*deaf.clips_of_questions(), *deaf.questions_of_clips()):
        assert all(math.isinf(rank) for rank in found.ranks)
        (row,) = pick(find_rows([found], seed=0, model="m"), metric="mrr", voice=None, length=None)
        assert row["value"] == 0.0


def test_a_question_two_clips_answer_is_found_by_either():
    asked = ["bread or bridge"]
    clips = [clip("bridge", asked), clip("harbour"), clip("bread", asked)]
    ear = Ear()
    hearing = Hearing("ear", clips, ear.hear([c.wave for c in clips]), ear.embed)
    (found,) = [f for f in hearing.clips_of_questions() if f.method == "ear vectors"]
    assert found.ranks == [1.0]
    assert found.queries[0].right == {0, 2}


def test_a_smaller_collection_asks_its_own_questions(hearing):
    (found, *_) = hearing.first(1).clips_of_questions()
    assert (found.size, len(found.queries)) == (1, 2)


def test_words_wrong(clips):
    said = ["the harbor", "the bridge is", ""]
    nothing = np.zeros(0, np.int32)
    heard = [Heard(text, nothing, np.zeros(4, np.float32)) for text in said]
    rows = word_rows(Hearing("ear", clips, heard, Ear().embed), seed=0, model="m", noise="none")
    assert [(r["voice"], r["value"], r["n"]) for r in rows] == [("a", 0.75, 2), ("b", 0.5, 1)]


def test_the_same_noise_each_time_and_as_loud_as_asked(clips):
    assert noisy(clips, None, 0) is clips
    worn, again = noisy(clips, 10.0, 0), noisy(clips, 10.0, 0)
    for before, after, other in zip(clips, worn, again, strict=True):
        assert np.array_equal(after.wave, other.wave)
        noise = after.wave - before.wave
        ratio = np.square(before.wave).mean() / np.square(noise).mean()
        assert 10 * math.log10(ratio) == pytest.approx(10.0, abs=0.1)
    assert not np.array_equal(worn[0].wave, noisy(clips, 10.0, 1)[0].wave)


def test_human_voices_have_their_words_and_questions(data_folder):
    clips = human(data_folder)
    assert len(clips) == 71
    assert sum(bool(c.questions) for c in clips) == len(spoken.QUESTIONS)
    assert len({q for c in clips for q, _ in c.questions}) == len(spoken.QUESTIONS)
    said = {c.article: c.text for c in clips}
    assert said["LJ001-0049"].endswith(
        "by fourteen ninety printing in venice had declined very much"
    )
    single = digits(data_folder, 5, 0)
    assert all(c.text in spoken_digits() and 0.1 < c.seconds < 3 for c in single)
    with pytest.raises(InputError, match="cannot read"):
        digits(Path("nowhere"), 5, 0)


def spoken_digits():
    return {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}


@needs_voices
def test_synthetic_clips_are_held_out(data_folder):
    clips = synthetic(data_folder, 3, 0)
    assert [c.text for c in clips] == [c.text for c in synthetic(data_folder, 3, 0)]
    assert all(c.questions and c.seconds > 1 for c in clips)
    for c in clips:
        question, answers = c.questions[0]
        assert question
        assert any(spoken.words_of(spoken.verbalised(a)) in c.text for a in answers)


def test_other_voices_may_speak_but_none_of_training(data_folder, monkeypatch):
    heard = []
    monkeypatch.setattr(
        spoken, "speak", lambda text, voice, speed: heard.append(voice) or np.ones(9, np.float32)
    )
    clips = synthetic(data_folder, 3, 0, [("hibari", "heart")])
    assert [c.voice for c in clips] == ["hibari heart"] * 3
    assert heard == [("hibari", "heart")] * 3
    with pytest.raises(ConfigError, match="training hears flite slt: give voices that it does not"):
        synthetic(data_folder, 3, 0, [("hibari", "heart"), ("flite", "slt")])


def test_more_clips_than_there_are(data_folder, monkeypatch):
    monkeypatch.setattr(spoken, "asked", lambda folder: [])
    with pytest.raises(InputError, match="has 0 held-out clips with questions, not 2"):
        synthetic(data_folder, 2, 0)


def test_an_hour_costs_what_it_costs(clips):
    rows = listen_cost.hear_rows({"a": Ear(), "b": Ear()}, clips, rounds=2, model="m")
    assert [(r["metric"], r["n"]) for r in rows] == [("hour", 2), ("hour", 2), ("times_as_fast", 2)]
    assert rows[2]["versus"] == "a"
    searched = listen_cost.search_rows(
        "a", Ear(), ["the bread"], ["bread"], 30, rounds=1, seed=0, model="m"
    )
    assert [r["size"] for r in searched] == [30] * 4


def test_texts_with_more_words_wrong_are_found_less(data_folder):
    """By words alone, which needs no model (sheet oracle 28)."""
    found = []
    for name, clips in spoken.misheard(data_folder, 150, 0).items():
        nothing = np.zeros(0, np.int32)
        heard = [Heard(c.text, nothing, np.zeros(1, np.float32)) for c in clips]
        hearing = Hearing(name, clips, heard, lambda question: np.zeros(1, np.float32))
        assert hearing.clips[0].questions
        (words,) = [f for f in hearing.clips_of_questions() if f.method.endswith("words")]
        (row,) = pick(share_rows(words, seed=0, part="errors", model="m"), metric="recall@1")
        assert row["n"] > 150
        found.append(row["value"])
    assert found == sorted(found, reverse=True)
    assert found[0] > found[2] + 0.1


def test_a_long_recording_is_indexed_by_the_command_line(clips, monkeypatch):
    asked = []

    def measured(words):
        asked.append((words, seconds_of(words[2])))
        return 6.0, 100.0

    monkeypatch.setattr(listen_cost, "_measured", measured)
    rows = listen_cost.index_rows("transcript", clips, [1, 2], model="m")
    assert [words[:2] for words, _ in asked] == [["listen", "index"]] * 2
    assert [round(seconds / 60) for _, seconds in asked] == [1, 2]
    values = [r["value"] for r in rows]
    assert values == pytest.approx([10.0, 100.0, 20.0, 100.0], rel=0.05)


def test_a_command_of_ours_is_timed_and_weighed():
    seconds, peak = listen_cost._measured(["listen", "--help"])
    assert seconds > 0
    assert 10 < peak < 4000
    with pytest.raises(ConfigError, match=r"indexing failed: .*nowhere"):
        listen_cost._measured(["listen", "index", "nowhere.wav", "-o", "nowhere"])


@pytest.fixture
def options(tmp_path, monkeypatch, clips):
    """Of a run in which nothing real speaks, hears or answers."""

    def made(folder, count, seed, voices=()):
        return [clip("penguin", ["a penguin"], article="four")]

    monkeypatch.setattr(listen, "human", lambda folder: clips)
    monkeypatch.setattr(listen, "synthetic", made)
    monkeypatch.setattr(listen, "digits", made)
    monkeypatch.setattr(listen_answers, "LLM", lambda model: None)
    return {"data": tmp_path, "backends": ["transcript"], "quick": True, "show_progress": False}


def test_answers_are_read_from_the_best_clips(options, tmp_path, monkeypatch):
    instead_of_models(monkeypatch, tmp_path / "cache")
    read = {}

    def ask(llm, question, documents):
        read[question] = [d.text for d in documents]
        return SimpleNamespace(text=f"It is the {question.split()[-1]}.")

    def transcribe(waves):
        return [SimpleNamespace(text="written") for _ in waves]

    monkeypatch.setattr(listen_answers, "ask", ask)
    monkeypatch.setattr(listen_answers.Transcriber, "load", lambda: transcribe)
    rows = listen.run(parts=["answers"], **options)
    three = ["the harbour", "the bridge", "the bread"]  # the best, in the order they were said
    assert read == {"is there a harbour": three, "what harbour": three}
    assert {r["metric"]: r["value"] for r in rows} == {
        "exact_match": 0.0,
        "token_f1": 0.5,
        "inclusion": 1.0,
    }
    options["backends"] = ["transcript:verbatim=no"]
    listen.run(parts=["answers"], **options)
    assert all(set(texts) == {"written"} for texts in read.values())


def test_a_run_is_taken_up_again(options, tmp_path, monkeypatch):
    ears = instead_of_models(monkeypatch, tmp_path / "cache")
    options["work"] = tmp_path / "work"
    rows = listen.run(parts=["find", "words", "time", "search"], **options)
    assert {r["noise"] for r in pick(rows, part="find")} == {"none", "10 dB"}
    assert listen.curves(rows)
    assert {r["metric"] for r in pick(listen.summary(rows), part="find")} == {
        "recall@1",
        "recall@10",
        "recall@1_difference",
    }
    heard = ears[-1].clips
    again = listen.run(parts=["find"], **options)
    assert ears[-1].clips == 0 < heard
    assert again == pick(rows, part="find")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"backends": []}, "give a backend first that hears"),
        ({"backends": ["oracle"]}, "give a backend first that hears"),
        ({"backends": ["transcript", "transcript"]}, "given twice"),
        ({"backends": ["whisper"]}, "unknown listening backend"),
        ({"parts": ["finding"]}, "unknown part 'finding'"),
        ({"voices": ["hibari"]}, "'hibari' is no program and a voice of it"),
        ({"quick": False, "clips": 0}, "must be at least 1"),
        ({"quick": False, "answers": 0}, "must be at least 1"),
    ],
)
def test_bad_options(options, wrong, told):
    with pytest.raises(ConfigError, match=told):
        listen.run(**{**options, **wrong})

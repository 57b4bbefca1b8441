"""Pieces by their spelling: the runs of letters, and a recogniser that writes by them."""

from __future__ import annotations

import torch

from narrows.retrieve.clsr import Pieces, Recogniser
from narrows.retrieve.spelling import LEAST, runs, spelt
from tiny_speech import clips, recogniser, text_encoder


def test_runs_know_where_a_word_begins():
    assert runs("at") == ["^", "a", "t", "^a", "at", "^at"]
    assert runs("##at") == ["a", "t", "at"]
    assert runs("[MASK]") == runs("7") == runs("é") == []


def test_rows_are_what_their_pieces_are_made_of():
    pieces = ["cat", "cot", "cut", "##cat", "[PAD]", "ab"]
    made = spelt(pieces).to_dense()
    found = [sorted(set(runs(piece))) for piece in pieces]
    sharing = {run: sum(run in own for own in found) for own in found for run in own}
    known = sorted(run for run, count in sharing.items() if count >= LEAST)
    assert known == ["^", "^c", "a", "c", "t"]
    for row, own in zip(made, found, strict=True):
        has = torch.tensor([float(run in own) for run in known])
        torch.testing.assert_close(row, has / has.sum().clamp(min=1).sqrt())


def test_no_known_runs_at_all():
    assert spelt(["[PAD]", "[UNK]"]).shape == (2, 0)


def test_scores_are_the_tables_and_the_spellings():
    made = recogniser(spelling=True)
    torch.manual_seed(1)
    x = torch.randn(3, made.config.width)
    plain = recogniser()
    torch.testing.assert_close(made.scores(x), plain.scores(x))  # nothing is learnt yet
    with torch.no_grad():
        made.runs.normal_()
    made.eval()
    names = Pieces.of(text_encoder()).names
    added = spelt(names).to_dense() @ made.runs
    torch.testing.assert_close(made.scores(x), plain.scores(x) + x @ added.T)


def test_alike_pieces_are_taught_together():
    """What teaches one piece teaches another of the same letters, and none that shares none."""
    made = recogniser(spelling=True).train()
    names = Pieces.of(text_encoder()).names
    x = torch.ones(1, made.config.width)
    made.scores(x)[0, names.index("north")].backward()
    taught = spelt(names).to_dense() @ made.runs.grad
    assert taught[names.index("north")].sum() > taught[names.index("storm")].sum() > 0
    assert not taught[names.index("[MASK]")].any()
    assert not taught[names.index("##c")].any()


def test_what_changed_is_written_anew():
    made = recogniser(spelling=True)
    states = clips([40, 30])
    before = [one.ids for one in made.recognise(states)]
    made.train()
    with torch.no_grad():
        made.runs.normal_(0.0, 30.0)
    made.eval()
    assert [one.ids for one in made.recognise(states)] != before


def test_saved_and_loaded(tmp_path):
    made = recogniser(spelling=True, near=2)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_((weight + 0.1 * torch.randn_like(weight)).bfloat16())
    made.eval()
    made.save(tmp_path)
    again = Recogniser.load(tmp_path, Pieces.of(text_encoder()))
    states = clips([40, 7, 23])
    assert again.recognise(states) == made.recognise(states)


def test_convolutions_over_states_do_not_read_padding():
    made = recogniser(near=2)
    states = clips([40, 7, 23, 1])
    for one, own in zip(made.recognise(states), states, strict=True):
        (alone,) = made.recognise([own])
        assert (alone.ids, alone.times) == (one.ids, one.times)

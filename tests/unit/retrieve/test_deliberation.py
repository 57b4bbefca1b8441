"""The second pass: Whisper's decoder read at once, padding and batches, and who asks for it."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

import tiny_speech
from narrows.errors import ConfigError, ModelError
from narrows.registry import build
from narrows.retrieve import deliberation
from narrows.retrieve.clsr import Draft, Pieces
from narrows.retrieve.clsr_backend import ClsrBackend
from narrows.retrieve.deliberation import BEHIND, PROMPT, SHARE, Deliberation
from narrows.retrieve.hearing import BACKENDS
from narrows.retrieve.speech_head import padded
from tiny_speech import STATE, clips, recogniser, text_encoder, whisper_tokenizer, whisper_weights

LENGTHS = [40, 23, 9]
COUNTS = torch.tensor([5, 3, 1])


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """In float32, whatever this machine multiplies faster."""
    monkeypatch.setattr(deliberation, "wide_matmul_dtype", lambda: torch.float32)


def drafted():
    """States, mask, a draft and scores of it."""
    made = recogniser()
    states, mask = padded(clips(LENGTHS))
    with torch.no_grad():
        draft, _ = made.draft(states, mask, COUNTS)
        return states, mask, draft, made.scores(draft.vectors[draft.places])


def peers_decoder(weights):
    """The same decoder by transformers."""
    layers = sum(name.endswith("/ffn/linear_0/weight") for name in weights)
    sizes = {"d_model": STATE, "decoder_layers": layers, "decoder_attention_heads": 2}
    config = WhisperConfig(
        vocab_size=len(weights["embeddings/weight"]),
        max_target_positions=len(weights["position_encodings/encodings"]),
        decoder_ffn_dim=3 * STATE,
        pad_token_id=0,
        **sizes,
    )
    found = {
        "embed_tokens.weight": weights["embeddings/weight"],
        "embed_positions.weight": weights["position_encodings/encodings"],
    }
    norms = {"layer_norm": "layer_norm"}
    plain = {
        "self_attention/linear_1": "self_attn.out_proj",
        "attention/linear_0": "encoder_attn.q_proj",
        "attention/linear_2": "encoder_attn.out_proj",
        "ffn/linear_0": "fc1",
        "ffn/linear_1": "fc2",
    }
    joint = {
        "self_attention/linear_0": ("self_attn", "qkv"),
        "attention/linear_1": ("encoder_attn", "kv"),
    }
    for i in range(layers):
        ours, theirs = f"layer_{i}/", f"layers.{i}."
        for part, name in (("self_attention", "self_attn"), ("attention", "encoder_attn")):
            norms[f"{ours}{part}/layer_norm"] = f"{theirs}{name}_layer_norm"
        norms[f"{ours}ffn/layer_norm"] = f"{theirs}final_layer_norm"
        for one, other in plain.items():
            for kind in ("weight", "bias"):
                found[f"{theirs}{other}.{kind}"] = weights[f"{ours}{one}/{kind}"]
        for one, (other, parts) in joint.items():
            for kind in ("weight", "bias"):
                split = weights[f"{ours}{one}/{kind}"].chunk(len(parts))
                for part, value in zip(parts, split, strict=True):
                    if (part, kind) != ("k", "bias"):  # Whisper's keys have none
                        found[f"{theirs}{other}.{part}_proj.{kind}"] = value
    for one, other in norms.items():
        found[f"{other}.weight"] = weights[f"{one}/gamma"]
        found[f"{other}.bias"] = weights[f"{one}/beta"]
    peer = WhisperDecoder(config)
    peer.load_state_dict(found)
    return peer.eval()


def tokens(piece):
    """Whisper's of a word piece."""
    text = piece[2:] if piece.startswith("##") else f" {piece}"
    return whisper_tokenizer().encode(text).ids or [0]


def test_it_is_whispers_decoder_beside_the_recogniser():
    """Oracle: transformers' decoder, given the prompt and the last token of each drafted piece, and
    asked for the first token of the next."""
    weights = whisper_weights()
    for name, value in weights.items():  # keys have no bias in Whisper
        if name.endswith("/self_attention/linear_0/bias"):
            value[STATE : 2 * STATE] = 0.0
        elif name.endswith("/attention/linear_1/bias"):
            value[:STATE] = 0.0
    pieces = Pieces.of(text_encoder())
    peer = peers_decoder(weights)
    states, mask, draft, scores = drafted()
    own = scores.masked_fill(pieces.special, -torch.inf).log_softmax(1)
    prompt = [whisper_tokenizer().token_to_id(one) for one in PROMPT]
    split = [tokens(piece) for piece in pieces.names]
    begins = weights["embeddings/weight"][[one[0] for one in split]]
    behind = BEHIND * torch.tensor([len(one) - 1.0 for one in split])
    rows = []
    best = own.argmax(1).split(COUNTS.tolist())
    for clip, length, ids in zip(states, LENGTHS, best, strict=True):
        before = [split[piece][-1] for piece in ids[:-1].tolist()]
        with torch.no_grad():
            found = peer(
                input_ids=torch.tensor([prompt + before]), encoder_hidden_states=clip[None, :length]
            ).last_hidden_state[0, len(prompt) - 1 :]
        rows.append(found @ begins.T - behind)
    whispers = torch.cat(rows).masked_fill(pieces.special, -torch.inf).log_softmax(1)
    expected = (whispers + SHARE * own) / (1 + SHARE)
    got = Deliberation(weights, whisper_tokenizer(), pieces)(states, mask, draft, scores)
    assert got.shape == (int(COUNTS.sum()), len(pieces.names))
    assert torch.equal(got.isinf().all(0), pieces.special)
    assert torch.allclose(got[:, ~pieces.special], expected[:, ~pieces.special], atol=1e-4)


def test_a_draft_is_read_alike_whatever_its_neighbours_and_padding():
    made = tiny_speech.deliberation()
    states, mask, draft, scores = drafted()
    together = made(states, mask, draft, scores)
    worse = states.masked_fill(~mask[:, :, None], torch.nan)
    assert torch.equal(made(worse, mask, draft, scores), together)
    start = 0
    for i, (length, count) in enumerate(zip(LENGTHS, COUNTS.tolist(), strict=True)):
        rows = slice(start, start + count)
        own = Draft(draft.embeds[[i], :count], draft.vectors[[i], :count], COUNTS[[i]])
        alone = made(states[[i], :length], mask[[i], :length], own, scores[rows])
        assert torch.allclose(alone, together[rows], atol=1e-4)
        start += count


def test_it_reads_the_clip_and_what_was_drafted_before():
    made = tiny_speech.deliberation()
    states, mask, draft, scores = drafted()
    usual = made(states, mask, draft, scores)
    elsewhere = made(states + mask[:, :, None] * states.flip(2), mask, draft, scores)
    known = ~made.special
    assert ((elsewhere - usual)[:, known].abs().amax(1) > 1e-3).all()
    # The first piece of the first clip is another: what follows in that clip changes, no other.
    scores[0] = scores[0].roll(1)
    changed = ((made(states, mask, draft, scores) - usual)[:, known].abs() > 1e-4).any(1)
    assert changed.tolist() == [True] * 5 + [False] * 4


def test_more_places_than_whisper_knows_and_none():
    made, states = recogniser(), clips([900, 2])
    revise = tiny_speech.deliberation()
    heard = made.recognise(states, revise)
    known = len(whisper_weights()["position_encodings/encodings"])
    assert len(heard[0].ids) > known
    assert [len(one.ids) for one in heard] == [len(one.ids) for one in made.recognise(states)]


def test_a_recogniser_is_revised_at_every_place():
    made = recogniser()
    states = clips(LENGTHS)
    drafts = made.recognise(states)

    def revise(batch, mask, draft, scores):
        assert batch.shape[:2] == mask.shape
        assert len(scores) == int(draft.counts.sum())
        return scores.roll(1, 1)

    revised = made.recognise(states, revise)
    assert [one.times for one in revised] == [one.times for one in drafts]
    assert [len(one.ids) for one in revised] == [len(one.ids) for one in drafts]
    assert any(one.ids != other.ids for one, other in zip(revised, drafts, strict=True))
    assert not made.special[[i for one in revised for i in one.ids]].any()


def test_a_backend_reads_twice_unless_told_not_to(tmp_path, monkeypatch):
    monkeypatch.setattr(Deliberation, "load", lambda name, pieces: tiny_speech.deliberation())
    recogniser().save(tmp_path)
    waves = [np.resize(clip.flatten().numpy(), 8000) for clip in clips(LENGTHS)]

    def written(**options):
        made = ClsrBackend(str(tmp_path), **options)
        made.__dict__["embedder"] = text_encoder()
        encode = SimpleNamespace(encode=lambda w: [torch.from_numpy(x).view(-1, STATE) for x in w])
        made.__dict__["speech"] = encode
        return [one.ids for one in made.write(waves)]

    once, twice = written(passes="1"), written()
    assert twice == written(passes="2")
    assert [*map(len, once)] == [*map(len, twice)]
    assert once != twice
    small = SimpleNamespace(state_size=STATE + 2)
    monkeypatch.setattr(Deliberation, "load", lambda name, pieces: small)
    with pytest.raises(ConfigError, match="give passes=1"):
        written()
    with pytest.raises(ConfigError, match="passes must be 1 or 2"):
        build(BACKENDS, "clsr:passes=3")


# ----------------------------------------------------------------------------------- its weights


def model(folder, arrays):
    """A CTranslate2 model of ``arrays``, each a name, a number for the type, and an array."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    body = b""
    for name, kind, array in arrays:
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        body += text(name) + shape + struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    (folder / "model.bin").write_bytes(head + body + struct.pack("<I", 0))


def test_weights_are_read_from_ctranslate2s_form(tmp_path, monkeypatch):
    monkeypatch.setattr(deliberation.hub, "resolve", lambda name: tmp_path)
    whisper_tokenizer().save(str(tmp_path / "tokenizer.json"))
    pieces = Pieces.of(text_encoder())
    halves = {
        f"decoder/{name}": (4, value.half().numpy())
        for name, value in whisper_weights().items()
        if name != "num_heads"
    }
    halves["decoder/num_heads"] = (2, np.array(2, np.int16))
    halves["encoder/conv1/weight"] = (1, np.ones(3, np.int8))
    model(tmp_path, [(name, *value) for name, value in halves.items()])
    near = {k: v.half().float() if v.ndim else v for k, v in whisper_weights().items()}
    same = Deliberation(near, whisper_tokenizer(), pieces)
    given = drafted()
    assert torch.equal(Deliberation.load("any", pieces)(*given), same(*given))
    halves["decoder/embeddings/weight"] = (1, np.ones((3, 2), np.int8))
    model(tmp_path, [(name, *value) for name, value in halves.items()])
    with pytest.raises(ModelError, match="int8 codes"):
        Deliberation.load("any", pieces)
    (tmp_path / "model.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match="damaged or cut short"):
        Deliberation.load("any", pieces)

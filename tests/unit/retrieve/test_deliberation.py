"""The second pass: Whisper's decoder read at once, padding and batches, what it saves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

import tiny_speech
from narrows.errors import ConfigError, ModelError
from narrows.model.fetch import sha256
from narrows.registry import build
from narrows.retrieve import clsr
from narrows.retrieve.clsr import Draft, Pieces
from narrows.retrieve.clsr_backend import ClsrBackend
from narrows.retrieve.deliberation import CONFIG, PROMPT, WEIGHTS, Decoder, Deliberation
from narrows.retrieve.hearing import BACKENDS
from narrows.retrieve.speech_head import padded
from tiny_speech import STATE, clips, deliberation, recogniser, text_encoder, whisper_tokenizer

LENGTHS = [40, 23, 9]
COUNTS = torch.tensor([5, 3, 1])


def stirred(seed=3):
    """One in which nothing is zero that training would change."""
    made = deliberation()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight += torch.randn_like(weight) / 4
    return made.eval()


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


def test_untrained_it_is_whispers_decoder():
    """Oracle: transformers' decoder, given the prompt and the last token of each drafted piece, and
    asked for the first token of the next."""
    weights = tiny_speech.whisper_weights()
    for name, value in weights.items():  # keys have no bias in Whisper
        if "self_attention/linear_0/bias" in name:
            value[STATE : 2 * STATE] = 0.0
        if "/attention/linear_1/bias" in name and "self" not in name:
            value[:STATE] = 0.0
    pieces = Pieces.of(text_encoder())
    made = deliberation()
    made = Deliberation(made.config, pieces, Decoder.of(weights, whisper_tokenizer(), pieces))
    with torch.no_grad():
        made.eval().share.zero_()
        made.bias.zero_()
    peer = peers_decoder(weights)
    states, mask, draft, scores = drafted()
    ids = scores.masked_fill(pieces.special, -torch.inf).argmax(1).split(COUNTS.tolist())
    tokenizer = whisper_tokenizer()
    prompt = [tokenizer.token_to_id(one) for one in PROMPT]
    table = weights["embeddings/weight"]

    def tokens(piece):
        name = pieces.names[piece]
        return tokenizer.encode(name[2:] if name.startswith("##") else f" {name}").ids

    begins = torch.tensor([(tokens(i) or [0])[0] for i in range(len(pieces.names))])
    expected = []
    with torch.no_grad():
        for own, length, pieces_of in zip(states, LENGTHS, ids, strict=True):
            before = [tokens(piece)[-1] for piece in pieces_of[:-1].tolist()]
            found = peer(
                input_ids=torch.tensor([prompt + before]), encoder_hidden_states=own[None, :length]
            ).last_hidden_state[0, len(prompt) - 1 :]
            expected.append(found @ table[begins].T)
        got = made(states, mask, draft, scores)
    assert got.shape == (int(COUNTS.sum()), len(pieces.names))
    assert torch.allclose(got, torch.cat(expected), atol=1e-4)


def test_a_draft_is_read_alike_whatever_its_neighbours_and_padding():
    made = stirred()
    states, mask, draft, scores = drafted()
    with torch.no_grad():
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


def test_it_reads_the_clip_the_draft_and_the_scores():
    made = stirred()
    states, mask, draft, scores = drafted()
    with torch.no_grad():
        usual = made(states, mask, draft, scores)
        others = [
            made(states.flip(1) + 1, mask, draft, scores),
            made(states, mask, draft._replace(embeds=draft.embeds.flip(2)), scores),
            made(states, mask, draft._replace(vectors=draft.vectors.flip(2)), scores),
            made(states, mask, draft, scores.roll(1, 1)),
        ]
    assert all((other - usual).abs().max() > 1e-2 for other in others)


def test_what_is_trained_is_small_and_comes_back(tmp_path):
    made = stirred()
    recogniser().save(tmp_path)
    own = sha256(tmp_path / clsr.WEIGHTS)
    made.config = made.config.model_copy(update={"recogniser": own})
    made.save(tmp_path)
    pieces = Pieces.of(text_encoder())
    given = drafted()

    def load(recogniser):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "load", lambda name, pieces: tiny_speech.whisper_decoder())
            return Deliberation.load(tmp_path, pieces, recogniser)

    again = load(own)
    with torch.no_grad():
        assert torch.allclose(again(*given), made(*given), atol=0.2)
        assert not torch.allclose(deliberation()(*given), made(*given), atol=0.2)
    with pytest.raises(ModelError, match="trained for another recogniser"):
        load("another")
    (tmp_path / WEIGHTS).write_bytes(b"short")
    with pytest.raises(ModelError, match="cannot read a second pass"):
        load(own)
    (tmp_path / CONFIG).write_text(json.dumps({"rank": 0}))
    with pytest.raises(ModelError, match="not a second pass's"):
        load(own)


def test_sizes_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="another text encoder or another Whisper"):
        deliberation(state_size=STATE + 1)
    with pytest.raises(ConfigError):
        deliberation(rank=0)


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


def test_a_backend_reads_twice_if_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr(Decoder, "load", lambda name, pieces: tiny_speech.whisper_decoder())
    recogniser().save(tmp_path)

    def backend(**options):
        made = ClsrBackend(str(tmp_path), **options)
        made.__dict__["embedder"] = text_encoder()
        encode = SimpleNamespace(encode=lambda wave: torch.from_numpy(wave).view(-1, STATE))
        made.__dict__["speech"] = encode
        return made

    assert backend().second is None
    with pytest.raises(ModelError, match="second pass"):
        _ = backend(passes="2").second
    made = stirred()
    own = sha256(tmp_path / clsr.WEIGHTS)
    made.config = made.config.model_copy(update={"recogniser": own})
    made.save(tmp_path)
    assert backend(passes="1").second is None
    twice = backend()
    assert twice.second is not None
    waves = [np.resize(clip.flatten().numpy(), 8000) for clip in clips(LENGTHS)]
    once = backend(passes="1").write(waves)
    again = twice.write(waves)
    assert [len(one.ids) for one in once] == [len(one.ids) for one in again]
    assert [one.ids for one in once] != [one.ids for one in again]
    with pytest.raises(ConfigError, match="passes must be 1 or 2"):
        build(BACKENDS, "clsr:passes=3")


def test_norms_are_trained_and_the_layers_are_not():
    trained = {name for name, _ in deliberation().named_parameters()}
    assert not any(name.endswith((".base", ".memory")) for name in trained)
    assert any("norms.0.weight" in name for name in trained)
    assert all(isinstance(weight, nn.Parameter) for weight in deliberation().parameters())

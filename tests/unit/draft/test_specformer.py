"""The SpecFormer module: what may see what, and that the engine runs what training ran."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch.nn.functional import rms_norm

from narrows.cache.dense import DensePolicy
from narrows.cache.stack import parse_cache
from narrows.config import EngineConfig, SamplingParams
from narrows.contracts import Asked, FlatBatch, Reading
from narrows.draft.combined import Combined
from narrows.draft.length import Plan
from narrows.draft.specformer import (
    WEIGHTS,
    GroupedRMSNorm,
    SpecFormer,
    SpecFormerConfig,
)
from narrows.draft.specformer_drafter import (
    PROBED,
    RESTING,
    SpecFormerDrafter,
    _forecaster,
    _State,
)
from narrows.draft.specs import make_drafter
from narrows.engine.engine import Engine
from narrows.errors import ConfigError, ModelError
from narrows.model.flat import FlatModel
from narrows.model.saved import CONFIG
from narrows.ops.native import linear
from tiny import FAMILIES, pair, prompts


def module(family: str = "llama", **changes: object) -> SpecFormer:
    config = SpecFormerConfig.of(pair(family)[0], **{"slots": 4, **changes})
    torch.manual_seed(0)  # after making the target, which sets its own
    made = SpecFormer(config)
    for weight in made.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1)
    return made


def taps_of(family: str, ids: list[int]) -> torch.Tensor:
    flat = pair(family)[0]
    wanted = SpecFormerConfig.of(flat).taps
    batch = FlatBatch([(0, len(ids))], [DensePolicy().build(flat.shape)])
    return flat.hidden_and_taps(torch.tensor(ids), torch.arange(len(ids)), batch, wanted)[1].clone()


def contexts(made: SpecFormer, family: str, ids: list[int], first: int = 0) -> torch.Tensor:
    count = len(ids) - first
    cosine, sine = pair(family)[0].rotary(torch.arange(count))
    with torch.no_grad():
        return made(taps_of(family, ids)[first:], cosine, sine, [count])


EXTENDED = {"anchor": True, "markov": 8, "draft_vocab": 60}


def test_sequences_end_to_end_do_not_see_each_other():
    made, texts = module(), prompts(3, longest=30, seed=2)
    cosine, sine = pair("llama")[0].rotary(torch.cat([torch.arange(len(t)) for t in texts]))
    lengths = [len(t) for t in texts]
    with torch.no_grad():
        together = made(torch.cat([taps_of("llama", t) for t in texts]), cosine, sine, lengths)
    for text, part in zip(texts, together.split(lengths), strict=True):
        torch.testing.assert_close(part, contexts(made, "llama", text))


def test_grouped_norm_is_a_norm_of_each_group():
    norm = GroupedRMSNorm(4, 33, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 4, 33, requires_grad=True)
    apart = [rms_norm(x[..., i, :], (33,), norm.weight[i], 1e-5) for i in range(4)]
    torch.testing.assert_close(norm(x), torch.stack(apart, -2))
    other = torch.autograd.grad(torch.stack(apart, -2).square().sum(), (x, norm.weight))
    mine = torch.autograd.grad(norm(x).square().sum(), (x, norm.weight))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b)
    assert norm(x.bfloat16()).dtype is torch.bfloat16


def test_the_future_of_the_context_is_not_seen():
    made, (ids,) = module(), prompts(1, longest=30, seed=1)
    before = contexts(made, "llama", ids)
    after = contexts(made, "llama", [*ids[:-1], (ids[-1] + 1) % 101])
    torch.testing.assert_close(before[:-1], after[:-1])
    assert (before[-1] - after[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_slots_see_each_other_both_ways_unless_causal(kind):
    made = module(draft_attention=kind)
    drafts = torch.randn(3, 4, 48)
    changed = drafts.clone()
    changed[:, 2] += 1.0
    a, b = made.between_slots(drafts), made.between_slots(changed)
    moved = (a - b).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == ([True] * 4 if kind == "bidirectional" else [False, False, True, True])


def test_slots_have_no_place_of_their_own():
    made, drafts, order = module(), torch.randn(3, 4, 48), torch.tensor([2, 0, 3, 1])
    permuted = made.between_slots(drafts[:, order])
    torch.testing.assert_close(permuted, made.between_slots(drafts)[:, order])


def test_fewer_slots_are_the_first_of_all():
    made, x, token = module(anchor=True), torch.randn(5, 48), torch.randn(5, 48)
    torch.testing.assert_close(made.slots(x, token, 2), made.slots(x, token)[:, :2])


@pytest.mark.parametrize("rows", [3071, 3073, 4096, 9000])
def test_many_rows_are_each_by_itself(rows):
    made, x = module(), torch.randn(rows, 48)
    with torch.no_grad():
        whole = made.slots(x, x)
        for part in (slice(0, 1), slice(3070, 3075), slice(rows - 1, rows)):
            torch.testing.assert_close(
                whole[part], made.slots(x[part], x[part]), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("chunk", "idle", "gather", "recent"),
    [(512, 0, 64, 999), (7, 0, 64, 999), (512, 12, 5, 999), (512, 0, 64, 12), (7, 0, 5, 12)],
)
def test_in_the_engine_guesses_are_those_of_the_whole_sequence(
    family, chunk, idle, gather, recent, monkeypatch
):
    """From a prompt's most recent tokens on, whatever its chunks, after any rollback, and after
    tokens behind which nothing was guessed."""
    monkeypatch.setattr("narrows.draft.specformer_drafter.PROMPT", gather)
    flat = pair(family)[0]
    texts = prompts(3, longest=40, seed=5)
    drafter = SpecFormerDrafter(module(family), flat, recent)
    offer, propose, guesses, seen = drafter.offer, drafter.propose, drafter.guesses, []
    drafter.offer = lambda a: [
        o if len(one.tokens) > idle + len(texts[one.number]) else []
        for o, one in zip(offer(a), a, strict=True)
    ]

    def note(asked):
        told = [(list(one.tokens), max(0, len(texts[one.number]) - recent)) for one in asked]
        drafter.guesses = lambda x, *more: (
            seen.extend(zip(told, x, strict=True)) or guesses(x, *more)
        )
        return propose(asked)

    read, shown = drafter.read, []
    drafter.read = lambda taps, kept: shown.append(len(taps)) or read(taps, kept)
    drafter.propose = note
    config = EngineConfig(cache_bytes=1 << 28, prefill_chunk=chunk, draft_tokens=3)
    machine = Engine(flat, parse_cache("dense"), config, drafter)
    for prompt in texts:
        machine.submit(prompt, SamplingParams(max_tokens=idle + 12, ignore_eos=True))
    for _ in machine.run():
        pass
    assert len(seen) > 8
    assert max(shown) <= len(texts) * recent  # nothing is kept of tokens before
    assert not drafter._states
    for (tokens, first), context in seen:
        whole = contexts(module(family), family, tokens, first)
        torch.testing.assert_close(context, whole[-2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("limit", ["LET_GO", "IDLE"])
def test_a_sequence_that_is_never_drafted_for_is_let_go(limit, monkeypatch):
    monkeypatch.setattr(f"narrows.draft.specformer_drafter.{limit}", 20)
    flat = pair("llama")[0]
    drafter = SpecFormerDrafter(module("llama"), flat)
    machine = Engine(flat, parse_cache("dense"), EngineConfig(cache_bytes=1 << 28), drafter)
    offered = {0: [], 1: []}

    def take(asked, rows, decoding):  # the second sequence's offers only
        for number, offers in asked:
            offered[number].append(len(offers))
        taken = [offers[0] if number and offers else None for number, offers in asked]
        return Plan(taken, [2 if offer else 0 for offer in taken], 0.0)

    machine.speculation._choose = lambda asked, *more: take(*more)
    for prompt in prompts(2, longest=10, seed=5):
        machine.submit(prompt, SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in machine.run():
        pass
    assert offered[0] == sorted(offered[0], reverse=True)
    assert 8 < sum(offered[0]) <= 20 < len(offered[0])
    assert all(offered[1])


def test_where_no_drafts_are_asked_for_few_sequences_are_followed(monkeypatch):
    """And all again, once one was. The states of the target are not tapped for the others."""
    monkeypatch.setattr("narrows.engine.speculation.LONGEST_REST", 1)  # else it may pass them over
    flat = pair("llama")[0]
    drafter = SpecFormerDrafter(module("llama"), flat)
    machine = Engine(flat, parse_cache("dense"), EngineConfig(cache_bytes=1 << 28), drafter)
    params, followed, wish = SamplingParams(max_tokens=6, ignore_eos=True), [], False

    def take(asked, offered, rows, decoding):
        taken = [offers[0] if wish and offers else None for _, offers in offered]
        return Plan(taken, [1 if offer else 0 for offer in taken])

    machine.speculation._choose = take
    period = PROBED << 1
    for number, prompt in enumerate(prompts(RESTING + 4 * period, longest=10, seed=5)):
        wish = number >= RESTING + 2 * period
        machine.submit(prompt, params)
        seen = 0
        for _ in machine.run():
            seen = max(seen, len(drafter._states))
        followed.append(seen)
        assert not drafter._states
    assert followed[:RESTING] == [1] * RESTING
    assert sum(followed[RESTING : RESTING + 2 * period]) == 2
    assert followed[RESTING + 3 * period :] == [1] * period


def test_drafts_for_few_at_a_time_do_not_count_for_many():
    drafter = SpecFormerDrafter(module("llama"), pair("llama")[0])
    one = Asked(999, [3, 4], 2)
    drafter._states[999] = _State(drafter._cache())
    drafter._states[999].context = torch.zeros(drafter.target.shape.hidden_size)

    def follows(number, others):
        drafter.wants(
            [Reading(number, 0, 5, 5), *[Reading(-1 - i, 7, 8, 8) for i in range(others)]]
        )
        return number in drafter._states

    for number in range(RESTING):
        assert follows(number, 15)
        assert follows(100 + number, 0)
    assert [follows(300 + i, 15) for i in range(2 * (PROBED << 5))].count(True) == 2
    drafter.offer([one])
    drafter.propose([one])
    assert follows(200, 0)
    assert not follows(201, 15)
    drafter.offer([one] * 16)
    drafter.propose([one])
    assert follows(202, 15)


def test_after_a_saved_cache_only_lookup_drafts():
    flat, config = pair("llama")[0], EngineConfig(cache_bytes=1 << 28, draft_tokens=3)
    prompt, more = prompts(1, longest=30, seed=5)[0] * 2, [7, 8, 9]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    texts, kinds = [], set()
    for drafter in (
        None,
        Combined([make_drafter("lookup", flat), SpecFormerDrafter(module(), flat)]),
    ):
        machine = Engine(flat, parse_cache("dense"), config, drafter)
        saved = machine.read(prompt)
        request = machine.submit(more, params, saved)
        if drafter is not None:
            offer = drafter.offer

            def note(asked, offer=offer):
                found = offer(asked)
                kinds.update(one.kind for some in found for one in some)
                return found

            drafter.offer = note
        for _ in machine.run():
            pass
        texts.append(request.generated)
    assert texts[0] == texts[1]
    assert kinds
    assert not any(kind.startswith("specformer") for kind in kinds)


@pytest.mark.parametrize("changes", [{}, EXTENDED])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_an_untrained_drafter_changes_no_text(family, changes):
    flat = pair(family)[0]
    for spec in ("dense", "kivi:bits=4,residual=32,group=16,value_group=16"):
        texts = []
        for drafter in (None, SpecFormerDrafter(module(family, **changes), flat)):
            config = EngineConfig(cache_bytes=1 << 28, draft_tokens=4 if drafter else None)
            machine = Engine(flat, parse_cache(spec), config, drafter)
            requests = [
                machine.submit(p, SamplingParams(max_tokens=40)) for p in prompts(5, seed=2)
            ]
            for _ in machine.run():
                pass
            texts.append([r.generated for r in requests])
        assert texts[0] == texts[1]


def test_extensions_look_at_the_token_before():
    """The anchor moves all slots with the newest token, the bias of a token its followers only,
    and nothing is guessed outside the part of the vocabulary."""
    flat, (ids,) = pair("llama")[0], prompts(1, longest=30, seed=3)
    made = module(**EXTENDED)
    made.vocabulary = torch.arange(30, 90, dtype=torch.int32)
    drafter = SpecFormerDrafter(made, flat)
    states = contexts(made, "llama", ids)[-1:].repeat(90, 1)
    newest = torch.arange(90)
    found, _ = drafter.guesses(states, newest, 4)
    assert found.min() >= 30
    assert found.max() < 90
    assert len(set(found[:, 0].tolist())) > 1
    slots = made.slots(states, flat.embed(newest))
    scores = flat.final_norm(slots) @ flat.head[30:90].T
    for slot in range(4):
        before = newest if slot == 0 else found[:, slot - 1]
        biased = scores[:, slot] + made.followers(made.narrowed(flat.embed(before)))
        assert torch.equal(biased.argmax(-1) + 30, found[:, slot])


def quick(family: str, **changes: object) -> SpecFormerDrafter:
    """A drafter of bfloat16 weights, which the kernels take."""
    flat = FlatModel(copy.deepcopy(pair(family)[0].model).bfloat16(), None, "")
    made = module(family, fingerprint=flat.fingerprint, **changes)
    if made.slot_bias is not None:
        torch.nn.init.normal_(made.slot_bias)
    return SpecFormerDrafter(made, flat)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_kernel_takes_in_what_the_module_does(family):
    """Sequences of different lengths, several times, across what one stretch of keys holds."""
    drafter = quick(family)
    fast, slow = ([_State(drafter._cache()) for _ in range(3)] for _ in range(2))
    for counts in ((1, 30, 7), (2, 1, 3), (250, 1, 1), (5, 5, 9), (64, 64, 1)):
        ends = list(itertools.accumulate(counts))
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        taps = torch.randn(ends[-1], len(drafter.taps), drafter.target.shape.hidden_size)
        places = [s.cache.places(a, b - a)[0] for s, (a, b) in zip(fast, spans, strict=True)]
        mine = drafter.fast.absorb(places, ends, taps)
        torch.testing.assert_close(mine, drafter._contexts(slow, taps, spans), rtol=0.02, atol=0.05)
    for a, b in zip(fast, slow, strict=True):
        assert a.cache.length == b.cache.length
        for x, y in zip(a.cache.materialize(), b.cache.materialize(), strict=True):
            torch.testing.assert_close(x, y, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    "changes", [{}, EXTENDED, {"draft_attention": "causal", "markov": 8}, {"positional": False}]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_kernel_forecasts_what_the_module_does(family, changes):
    """Bfloat16 weights; each token it finds is the likeliest by the module itself, given the one
    before it, up to what bytes round, and as likely as it says."""
    drafter = quick(family, **changes)
    flat, made = drafter.target, drafter.module
    assert drafter.fast is not None
    same = []
    for n, most in ((7, 4), (7, 2), (2, 4), (12, 3)):
        states, newest = torch.randn(n, flat.shape.hidden_size), torch.arange(7, 7 + n)
        found, chances = drafter.fast.forecast(states, newest, flat.embed(newest).float(), most, 0)
        with torch.inference_mode():
            slots = made.slots(states, flat.embed(newest).float(), most)
            scores = linear(flat.final_norm(slots.flatten(0, 1)), drafter.head).view(n, most, -1)
            for slot in range(most):
                before = newest if slot == 0 else found[:, slot - 1]
                likely = scores[:, slot]
                if drafter.narrowed is not None:
                    likely = likely + made.followers(drafter.narrowed[before].float())
                named = torch.arange(200) if drafter.named is None else drafter.named
                place = torch.searchsorted(named, found[:, slot])
                best = likely.max(-1).values
                mine = likely.gather(-1, place[:, None])[:, 0]
                torch.testing.assert_close(mine, best, rtol=0.02, atol=0.02)
                same += (mine == best).tolist()
                sure = likely.softmax(-1).gather(-1, place[:, None])[:, 0]
                torch.testing.assert_close(chances[:, slot], sure, rtol=0.05, atol=0.01)
    assert sum(same) >= 0.8 * len(same)


@pytest.mark.parametrize("fast", [True, False])
def test_no_more_is_looked_for_behind_what_is_too_unlikely(fast):
    """Wherever the sequences stop, the rest is what it is without a limit."""
    drafter = quick("llama", **EXTENDED)
    if not fast:
        drafter.fast = None
    for n in (1, 3, 11):
        states, newest = 3 * torch.randn(n, drafter.target.shape.hidden_size), torch.arange(n)
        with torch.inference_mode():
            whole, chances = drafter.guesses(states, newest, 4)
            before = torch.cat([torch.ones(n, 1), chances.cumprod(1)[:, :-1]], 1)
            for least in (0.0, *before[:, 1:].flatten().quantile(torch.tensor([0.3, 0.7])), 2.0):
                wanted = before >= least
                tokens, sure = drafter.guesses(states, newest, 4, float(least))
                assert torch.equal(tokens, torch.where(wanted, whole, -1))
                torch.testing.assert_close(sure, torch.where(wanted, chances, 0.0))


@pytest.mark.parametrize("fast", [True, False])
def test_a_module_that_makes_nan_changes_no_text(fast):
    drafter = quick("llama")
    if not fast:
        drafter.fast = None
    texts = []
    for spoilt in (False, True):
        if spoilt:
            drafter.module.down.weight.fill_(torch.nan)
            drafter.fast = _forecaster(drafter) if fast else None
        config = EngineConfig(cache_bytes=1 << 28)
        machine = Engine(drafter.target, parse_cache("dense"), config, drafter if spoilt else None)
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        asked = [machine.submit(p, params) for p in prompts(2, longest=20, seed=3)]
        for _ in machine.run():
            pass
        texts.append([one.generated for one in asked])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("changes", [{}, EXTENDED])
def test_what_was_saved_is_loaded_and_the_target_stays(tmp_path, changes):
    flat = pair("llama")[0]
    before = {k: v.clone() for k, v in flat.model.state_dict().items()}
    config = flat.config.to_dict()
    made = module(**changes)
    made.save(tmp_path)
    again = SpecFormer.load(tmp_path)
    assert again.config == made.config
    for name, weight in made.state_dict().items():
        stored = weight.bfloat16().float() if weight.is_floating_point() else weight
        assert torch.equal(again.state_dict()[name], stored)
    SpecFormerDrafter(again, flat)
    assert flat.config.to_dict() == config
    assert all(torch.equal(before[k], v) for k, v in flat.model.state_dict().items())


def test_a_drafter_of_another_model_is_refused():
    for family, what in (("qwen2", "fingerprint"), ("gemma3_text", "layer|last tapped")):
        with pytest.raises(ConfigError, match=what):
            SpecFormerDrafter(module("llama"), pair(family)[0])
    other = module("llama").config.model_copy(update={"vocab_size": 7})
    with pytest.raises(ConfigError, match="vocabulary"):
        SpecFormerDrafter(SpecFormer(other), pair("llama")[0])


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot read"):
        SpecFormer.load(tmp_path)
    module().save(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot read"):
        SpecFormer.load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "slots": 3}))
    with pytest.raises(ModelError, match="do not belong"):
        SpecFormer.load(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(ModelError, match="depth"):
        SpecFormer.load(tmp_path)

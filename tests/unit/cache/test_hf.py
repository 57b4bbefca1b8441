"""Any policy inside stock transformers: dense gives what DynamicCache gives, bit for bit, and a
policy that loses precision is sealed, cropped, padded, copied and reordered as it should be."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import narrows.cache
from narrows.cache.dense import DenseLayer
from narrows.cache.hf import HELD, PolicyCache, hf_cache
from narrows.cache.stack import parse_cache
from narrows.contracts import CachePolicy, FlatBatch, LayerCache, LayerShape, ModelShape
from narrows.errors import ConfigError, InputError, ModelError, UnsupportedModel
from tiny import FAMILIES, config, hash_of, pair, prompts

TAIL = 6
"""Newest tokens that ``CoarseLayer`` keeps exact once it is sealed."""


class CoarseLayer(LayerCache):
    """A stand-in for a quantised layer: once sealed, all but the newest TAIL tokens are rounded to
    whole numbers, and cannot be rolled back. A borrower sees its owner's values."""

    def __init__(self, shape: LayerShape, owner: CoarseLayer | None, like: ModelShape) -> None:
        self.dense = DenseLayer(shape, like.dtype, like.device)
        self.owner = owner
        self.rounded: int | None = None
        self.seals = 0

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.dense.length

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.dense.append(k, v)
        self._fold()

    def _fold(self) -> None:
        if self.rounded is None:
            return
        stop = max(self.rounded, self.length - TAIL)
        for buffer in (self.dense.k, self.dense.v):
            buffer[:, self.rounded : stop] = buffer[:, self.rounded : stop].round()
        self.rounded = stop

    def seal(self) -> None:
        self.seals += 1
        self.rounded = 0
        self._fold()

    def rollback(self, n: int) -> None:
        if self.rounded is not None and n > self.length - self.rounded:
            raise ValueError(f"{n} tokens are not in the dense tail")
        self.dense.rollback(n)

    def attend(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        return self.dense.attend(q, scale)

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.dense.materialize()
        if self.owner is not None and self.rounded:
            v = torch.cat([self.owner.materialize()[1][: self.rounded], v[self.rounded :]])
        return k, v

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes


@dataclass(frozen=True)
class CoarsePolicy:
    """The first full-attention layer owns the values of the next."""

    borrow: bool = False
    spec: str = "coarse"

    def build(self, shape: ModelShape) -> list[LayerCache]:
        layers: list[LayerCache] = []
        owner: CoarseLayer | None = None
        for layer in shape.layers:
            if layer.window is not None:
                layers.append(DenseLayer(layer, shape.dtype, shape.device))
                continue
            made = CoarseLayer(layer, owner if self.borrow else None, shape)
            owner = made if owner is None else None
            layers.append(made)
        return layers

    def estimate(self, shape: ModelShape, tokens: int) -> int:
        return 0


@functools.cache
def stock(family: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(hash_of(family))
    return AutoModelForCausalLM.from_config(config(family), attn_implementation=attention).eval()


SMALL = "group=16,residual=16"
QUANTISED = [f"kivi:{SMALL}", f"xquant:{SMALL},value_share_from=0,sink=2", f"kivi:{SMALL},hold=8"]


def ids(n: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 101, (batch, n), generator=generator)


def generate(model: Any, cache: Any, inputs: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(5)
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}
    return model.generate(
        inputs,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        assert torch.equal(a, b)


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    inputs = torch.zeros((len(lengths), longest), dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for i, n in enumerate(lengths):
        inputs[i, longest - n :] = ids(n, seed=i)[0]
        mask[i, longest - n :] = 1
    return inputs, mask


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "assisted": {"assistant": True},
    "chunked": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_dynamic_cache_bit_for_bit(family: str, mode: str, attention: str) -> None:
    model, options = stock(family, attention), dict(MODES[mode])
    if options.pop("assistant", False):
        options["assistant_model"] = stock("llama" if family != "llama" else "qwen3")
    inputs = ids(30).repeat(1, 2)  # repeats, so that looking up in the prompt finds drafts
    theirs = generate(model, DynamicCache(config=model.config), inputs, **options)
    assert_same(generate(model, hf_cache("dense", model), inputs, **options), theirs)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_dynamic_cache_with_left_padding(family: str, mode: str) -> None:
    model = stock(family)
    inputs, mask = left_padded((31, 3, 50))
    options = {**MODES[mode], "attention_mask": mask}
    theirs = generate(model, DynamicCache(config=model.config), inputs, **options)
    assert_same(generate(model, hf_cache("dense", model), inputs, **options), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_dynamic_cache_over_several_turns(family: str) -> None:
    model = stock(family)
    caches = [DynamicCache(config=model.config), hf_cache("dense", model)]
    inputs, mask = left_padded((31, 12))
    done = []
    for cache in caches:
        so_far, shown = inputs, mask
        for turn in range(3):
            out = generate(model, cache, so_far, attention_mask=shown)
            more = ids(9, seed=turn, batch=2)
            so_far = torch.cat([out.sequences, more], 1)
            shown = torch.cat([shown, torch.ones((2, 24 + 9), dtype=torch.long)], 1)
            done.append(out)
    for theirs, ours in zip(done[:3], done[3:], strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("spec", QUANTISED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_every_mode_runs_quantised(family: str, mode: str, spec: str) -> None:
    model, options = stock(family), dict(MODES[mode])
    if options.pop("assistant", False):
        options["assistant_model"] = stock("qwen3")
    cache = hf_cache(spec, model)
    out = generate(model, cache, ids(30).repeat(1, 2), **options)
    assert out.sequences.shape[1] == 84
    assert cache.get_seq_length() == 83
    for row in cache.sequences:
        for place, layer in enumerate(row):
            assert layer.length == 83, place


def test_dense_cache_of_a_prompt_can_be_copied_and_used_twice() -> None:
    model = stock("llama")
    prompt, rest = ids(40), [ids(5, seed=1), ids(8, seed=2)]
    cache = hf_cache("dense", model)
    model(prompt, past_key_values=cache)
    for more in rest:
        whole = torch.cat([prompt, more], 1)
        ours = generate(model, copy.deepcopy(cache), whole)
        theirs = generate(model, DynamicCache(config=model.config), whole)
        assert torch.equal(ours.sequences, theirs.sequences)
    assert cache.get_seq_length() == 40


# --------------------------------------------------------------------------- when it is sealed


def test_the_prompt_is_attended_to_exactly_and_what_follows_is_not() -> None:
    model = stock("llama")
    exact, coarse = DynamicCache(config=model.config), hf_cache(CoarsePolicy(), model)
    prompt, more = ids(40), ids(1, seed=1)
    first = [model(prompt, past_key_values=c).logits for c in (exact, coarse)]
    second = [model(more, past_key_values=c).logits for c in (exact, coarse)]
    assert torch.equal(*first)
    assert not torch.allclose(*second)
    assert all(c.seals == 1 and c.rounded == 41 - TAIL for c in coarse.sequences[0])


@pytest.mark.parametrize("policy", [CoarsePolicy(), *map(parse_cache, QUANTISED)], ids=str)
@torch.inference_mode()
def test_decoding_is_our_engines(policy: CachePolicy) -> None:
    flat, model = pair("llama")
    (prompt,) = prompts(1, longest=200)
    cache, ours = hf_cache(policy, model), policy.build(flat.shape)
    at = torch.arange(len(prompt))
    model(torch.tensor([prompt]), past_key_values=cache)
    flat.hidden(torch.tensor(prompt), at, FlatBatch([(0, len(prompt))], [ours]))
    for layer in ours:
        layer.seal()
    for step, token in enumerate(ids(40)[0].tolist()):
        theirs = model(torch.tensor([[token]]), past_key_values=cache).logits[0]
        place = torch.tensor([len(prompt) + step])
        hidden = flat.hidden(torch.tensor([token]), place, FlatBatch([(0, 1)], [ours]))
        torch.testing.assert_close(theirs, flat.logits(hidden), rtol=1e-3, atol=1e-4)


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it() -> None:
    model = stock("llama")
    cache = hf_cache(CoarsePolicy(), model)
    with torch.inference_mode():
        model(ids(20), past_key_values=cache)
    model(ids(3), past_key_values=cache).logits.sum().backward()
    model(ids(1), past_key_values=copy.deepcopy(cache))
    with torch.inference_mode():
        cache.batch_repeat_interleave(2)
    model(ids(1, batch=2), past_key_values=cache)
    assert cache.get_seq_length() == 24


def test_seal_can_be_asked_for_and_happens_once() -> None:
    model = stock("llama")
    cache = hf_cache(CoarsePolicy(), model)
    model(ids(40), past_key_values=cache)
    assert [c.seals for c in cache.sequences[0]] == [0, 0, 0]
    cache.seal()
    cache.seal()
    model(ids(3), past_key_values=cache)
    assert [c.seals for c in cache.sequences[0]] == [1, 1, 1]


def test_a_prompt_in_chunks_is_sealed_when_all_of_it_is_read() -> None:
    model = stock("llama")
    prompt = ids(40)
    whole = generate(model, hf_cache(CoarsePolicy(), model), prompt)
    cache = hf_cache(CoarsePolicy(), model, prompt_tokens=40)
    chunked = generate(model, cache, prompt, prefill_chunk_size=16)
    assert torch.equal(whole.sequences, chunked.sequences)
    torch.testing.assert_close(whole.scores, chunked.scores)
    early = generate(model, hf_cache(CoarsePolicy(), model), prompt, prefill_chunk_size=16)
    assert not torch.allclose(whole.scores[0], early.scores[0])  # the first chunk was sealed


def test_several_tokens_after_the_prompt_see_each_other_exactly() -> None:
    model = stock("llama")
    coarse = hf_cache(CoarsePolicy(), model)
    model(ids(40), past_key_values=coarse)
    coarse.seal()
    seen = coarse._rows.view(0, 40, torch.zeros(()))[0]
    k = torch.randn(1, 2, 20, 16)
    keys, _ = coarse.update(k, k, 0)
    assert torch.equal(keys[:, :, :40], seen)
    assert torch.equal(keys[:, :, 40:], k)
    stored = coarse.sequences[0][0]
    assert stored.rounded == 60 - TAIL


# ----------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("policy", ["dense", CoarsePolicy(), CoarsePolicy(borrow=True)])
def test_padding_is_not_stored(policy: Any) -> None:
    model = stock("llama")
    inputs, mask = left_padded((31, 3, 50))
    cache = hf_cache(policy, model)
    out = generate(model, cache, inputs, attention_mask=mask)
    for i, n in enumerate((31, 3, 50)):
        alone = hf_cache(policy, model)
        single = generate(model, alone, inputs[i : i + 1, -n:])
        assert torch.equal(single.sequences[0, n:], out.sequences[i, 50:])
        for ours, its in zip(cache.sequences[i], alone.sequences[0], strict=True):
            assert ours.length == its.length == n + 23
            torch.testing.assert_close(ours.materialize(), its.materialize())


def tokens(n: int, seed: int = 0, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn((2, batch, 2, n, 16), generator=generator)
    return k, v


def feed(cache: PolicyCache, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> Any:
    """One pass as a model of three layers makes it; what the last layer's queries would see."""
    cache.note_mask(mask)
    for layer in range(3):
        seen = cache.update(k + layer, v - layer, layer)
    return seen


@pytest.mark.parametrize("spec", ["dense", *QUANTISED])
def test_a_padded_row_is_stored_and_seen_as_if_alone(spec: str) -> None:
    model, lengths = stock("llama"), (31, 3, 50)
    _, mask = left_padded(lengths)
    batch = hf_cache(spec, model)
    alone = [hf_cache(spec, model) for _ in lengths]
    k, v = tokens(50, batch=3)
    feed(batch, k, v, mask)
    for i, n in enumerate(lengths):
        feed(alone[i], k[i : i + 1, :, -n:], v[i : i + 1, :, -n:])
    for step, new in enumerate([1] * 20 + [30, 1]):
        k, v = tokens(new, seed=step, batch=3)
        mask = torch.cat([mask, torch.ones((3, new), dtype=torch.long)], 1)
        seen = feed(batch, k, v, mask)
        for i, n in enumerate(lengths):
            single = feed(alone[i], k[i : i + 1], v[i : i + 1])
            for ours, its in zip(seen, single, strict=True):
                assert torch.equal(ours[i, :, 50 - n :], its[0])
    for row, single in zip(batch.sequences, alone, strict=True):
        for ours, its in zip(row, single.sequences[0], strict=True):
            for a, b in zip(ours.materialize(), its.materialize(), strict=True):
                assert torch.equal(a, b)


def test_padding_in_the_middle_is_not_stored() -> None:
    model = stock("llama")
    cache = hf_cache("dense", model)
    inputs, first = left_padded((9, 4))
    more, shown = left_padded((5, 7))
    mask = torch.cat([first, shown], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model(inputs, attention_mask=first, position_ids=places[:, :9], past_key_values=cache)
    ours = model(
        more, attention_mask=mask, position_ids=places[:, 9:], past_key_values=cache
    ).logits
    assert [row[0].length for row in cache.sequences] == [14, 11]
    whole = torch.cat([inputs, more], 1)
    for i in range(2):
        alone = model(whole[i : i + 1, mask[i].bool()]).logits[0, -shown[i].sum() :]
        torch.testing.assert_close(ours[i, shown[i].bool()], alone)


def test_without_the_hook_padding_is_stored() -> None:
    model = copy.deepcopy(stock("llama"))
    model.base_model._forward_pre_hooks.clear()
    cache = hf_cache("dense", stock("llama"))
    inputs, mask = left_padded((9, 4))
    model(inputs, attention_mask=mask, past_key_values=cache)
    assert [row[0].length for row in cache.sequences] == [9, 9]


def test_one_hook_however_many_caches() -> None:
    model = copy.deepcopy(stock("llama"))
    for _ in range(3):
        hf_cache("dense", model)
    assert len(model.base_model._forward_pre_hooks) == 1


def test_a_mask_that_shows_what_it_hid_is_refused() -> None:
    model = stock("llama")
    cache = hf_cache("dense", model)
    inputs, mask = left_padded((9, 4))
    model(inputs, attention_mask=mask, past_key_values=cache)
    shown = torch.ones((2, 10), dtype=torch.long)
    with pytest.raises(InputError, match="hid when"):
        model(ids(1, batch=2), attention_mask=shown, past_key_values=cache)


# ------------------------------------------------------------------------------------ batches


def test_copies_borrow_within_themselves() -> None:
    model = stock("llama")
    cache = hf_cache(CoarsePolicy(borrow=True), model)
    model(ids(30, batch=2), past_key_values=cache)
    before = cache.sequences
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    rows = cache.sequences
    assert rows[0] is before[1]
    assert rows[2] is before[0]
    for row in rows:
        assert row[1].owner is row[0]
    assert len({id(layer) for row in rows for layer in row}) == 9


@pytest.mark.parametrize("policy", [CoarsePolicy(), CoarsePolicy(borrow=True)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_reordering_commutes_with_reading(family: str, policy: CoarsePolicy) -> None:
    model = stock(family)
    prompt, more = ids(30, batch=3), ids(1, batch=4, seed=1)
    order = torch.tensor([2, 0, 0, 1])
    late, early = hf_cache(policy, model), hf_cache(policy, model)
    model(prompt, past_key_values=late)
    late.seal()
    late.reorder_cache(order)
    model(prompt[order], past_key_values=early)
    a = model(more, past_key_values=late).logits
    b = model(more, past_key_values=early).logits
    torch.testing.assert_close(a, b)


def test_select_and_repeat() -> None:
    model = stock("llama")
    cache = hf_cache("dense", model)
    inputs, mask = left_padded((9, 4))
    assert cache.batch_size == -1
    model(inputs, attention_mask=mask, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert [row[0].length for row in cache.sequences] == [9, 9, 4, 4]
    cache.batch_select_indices(torch.tensor([False, True, True, False]))
    assert [row[0].length for row in cache.sequences] == [9, 4]
    cache.batch_select_indices(torch.tensor([1]))
    assert [row[0].length for row in cache.sequences] == [4]
    assert cache.batch_size == 1


@pytest.mark.parametrize("spec", QUANTISED)
def test_reordering_commutes_with_reading_bit_for_bit(spec: str) -> None:
    model, order = stock("llama"), torch.tensor([2, 0, 0, 1])
    late, early = hf_cache(spec, model), hf_cache(spec, model)
    k, v = tokens(45, batch=3)
    feed(late, k, v)
    late.seal()
    late.reorder_cache(order)
    feed(early, k[order], v[order])
    for step in range(20):
        k, v = tokens(1, seed=step, batch=4)
        for ours, its in zip(feed(late, k, v), feed(early, k, v), strict=True):
            assert torch.equal(ours, its)


def test_beams_with_a_borrower_are_those_of_reading_each_beam_alone() -> None:
    model = stock("llama")
    out = generate(model, hf_cache(CoarsePolicy(borrow=True), model), ids(30), num_beams=3)
    cache = hf_cache(CoarsePolicy(borrow=True), model)
    model(ids(30), past_key_values=cache)
    score = torch.tensor(0.0)
    logits = model(ids(30)).logits[0, -1]
    for token in out.sequences[0, 30:]:
        score += logits.log_softmax(-1)[token]
        logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(score / 24, out.sequences_scores[0])


# --------------------------------------------------------------------------------- going back


def stop_recording(cache: PolicyCache) -> None:
    """As transformers does when it gives a cache back."""
    for layer in cache.layers:
        layer.record_past = False


def test_crop_before_sealing_is_exact_for_any_policy() -> None:
    model = stock("gemma3_text")
    cache, never = (hf_cache(CoarsePolicy(), model) for _ in range(2))
    prompt = ids(60)
    model(prompt, past_key_values=cache)
    cache.crop(-7)
    model(prompt[:, :53], past_key_values=never)
    more = ids(3, seed=2)
    a, b = (model(more, past_key_values=c).logits for c in (cache, never))
    torch.testing.assert_close(a, b)
    assert cache.get_seq_length() == 56


def test_recorded_tokens_can_be_taken_back_from_any_policy() -> None:
    model = stock("gemma3_text")
    cache, never = (hf_cache(CoarsePolicy(), model) for _ in range(2))
    prompt, draft = ids(60), ids(3 * TAIL, seed=1)
    for c in (cache, never):
        model(prompt, past_key_values=c)
        c.seal()
    cache.activate_past_recording()
    model(draft, past_key_values=cache)
    assert cache.get_seq_length() == 60 + 3 * TAIL
    assert cache.nbytes > sum(layer.nbytes for layer in cache.sequences[0])
    cache.crop(-2 * TAIL)
    assert cache.nbytes == sum(layer.nbytes for layer in cache.sequences[0])
    model(draft[:, :TAIL], past_key_values=never)
    for ours, its in zip(cache.sequences[0], never.sequences[0], strict=True):
        torch.testing.assert_close(ours.materialize(), its.materialize())
    assert cache.sequences[0][2].rounded == 60


def test_recording_holds_back_a_bounded_number_of_tokens() -> None:
    model = stock("llama")
    cache = hf_cache(CoarsePolicy(), model)
    model(ids(30), past_key_values=cache)
    cache.activate_past_recording()
    model(ids(HELD + 40), past_key_values=cache)
    model(ids(1), past_key_values=cache)
    assert {layer.length for layer in cache.sequences[0]} == {30 + 41}
    assert cache.get_seq_length() == 30 + HELD + 41
    stop_recording(cache)
    model(ids(1), past_key_values=cache)
    assert {layer.length for layer in cache.sequences[0]} == {30 + HELD + 42}


@pytest.mark.parametrize("spec", ["dense", *QUANTISED])
def test_a_draft_taken_back_leaves_no_trace(spec: str) -> None:
    model = stock("llama")
    cache, never = (hf_cache(spec, model) for _ in range(2))
    for c in (cache, never):
        feed(c, *tokens(40))
    cache.activate_past_recording()
    for step in range(12):
        k, v = tokens(7, seed=step)
        feed(cache, k, v)
        cache.crop(-(step % 7))
        for i in range(7 - (step % 7)):
            feed(never, k[:, :, i : i + 1], v[:, :, i : i + 1])
    stop_recording(cache)
    k, v = tokens(1)
    for ours, its in zip(feed(cache, k, v), feed(never, k, v), strict=True):
        assert torch.equal(ours, its)


def test_hold_lets_a_quantised_cache_be_cropped_without_recording() -> None:
    model, spec = stock("llama"), f"kivi:{SMALL}"
    for hold, works in ((8, True), (0, False)):
        cache = hf_cache(f"{spec},hold={hold}" if hold else spec, model)
        feed(cache, *tokens(40))
        cache.seal()
        for step in range(41):
            feed(cache, *tokens(1, seed=step))
        if works:
            cache.crop(-8)
            assert cache.get_seq_length() == 73
        else:
            with pytest.raises(ConfigError, match="give the cache hold=9; or call activate"):
                cache.crop(-9)


@pytest.mark.parametrize("mode", ["lookup", "assisted"])
def test_drafts_leave_what_reading_one_by_one_leaves(mode: str) -> None:
    model, options = stock("llama"), dict(MODES[mode])
    if options.pop("assistant", False):
        options["assistant_model"] = model  # so that drafts are accepted
    inputs = ids(30).repeat(1, 2)
    cache = hf_cache(CoarsePolicy(borrow=True), model)
    out = generate(model, cache, inputs, **options)
    replay = hf_cache(CoarsePolicy(borrow=True), model)
    model(inputs, past_key_values=replay)
    replay.seal()
    stored = cache.get_seq_length()
    assert stored == out.sequences.shape[1] - 1
    for ours, its in zip(cache.sequences[0], replay.sequences[0], strict=True):
        k, v = ours.dense.materialize()
        assert ours.length == stored
        assert ours.rounded == stored - TAIL
        # One by one: what the verified passes computed, appended to a sealed layer.
        fresh = CoarseLayer(ours.dense.shape, None, cache._rows.shape)
        fresh.append(*(x[:60] for x in its.dense.materialize()))
        fresh.seal()
        for i in range(60, stored):
            fresh.append(k[i : i + 1], v[i : i + 1])
        torch.testing.assert_close(fresh.dense.materialize(), (k, v))


def test_a_crop_the_policy_cannot_do_says_what_to_do() -> None:
    model = stock("llama")
    cache = hf_cache(CoarsePolicy(), model)
    model(ids(40), past_key_values=cache)
    cache.seal()
    with pytest.raises(
        ConfigError, match=r"'coarse': layer 0 cannot be cropped by 7.*dense tail; or call"
    ):
        cache.crop(-TAIL - 1)


def test_crop_to_a_length_as_older_callers_ask() -> None:
    model = stock("llama")
    cache = hf_cache("dense", model)
    model(ids(40), past_key_values=cache)
    cache.crop(50)
    assert cache.get_seq_length() == 40
    cache.crop(12)
    assert cache.get_seq_length() == 12
    cache.crop(0)
    cache.crop(-100)
    assert cache.get_seq_length() == 0


# -------------------------------------------------------------------------------------- misuse


def test_another_batch_size_is_refused() -> None:
    model = stock("llama")
    cache = hf_cache("dense", model)
    model(ids(4, batch=2), past_key_values=cache)
    with pytest.raises(InputError, match="holds 2 sequences, but 3"):
        model(ids(4, batch=3), past_key_values=cache)
    cache.reset()
    model(ids(4, batch=3), past_key_values=cache)
    assert cache.batch_size == 3


def test_a_pass_that_stopped_half_way_is_noticed() -> None:
    cache = hf_cache("dense", stock("llama"))
    k = torch.zeros(1, 2, 5, 16)
    cache.update(k, k, 0)
    with pytest.raises(ModelError, match="half way"):
        cache.update(k, k, 0)
    cache.reset()
    cache.update(k, k, 0)


class Forgetful(CoarseLayer):
    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().materialize()
        return k[5:], v[5:]


def test_a_policy_that_drops_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock("llama")
    monkeypatch.setattr(f"{__name__}.CoarseLayer", Forgetful)
    cache = hf_cache(CoarsePolicy(), model)
    model(ids(9), past_key_values=cache)
    with pytest.raises(ConfigError, match="gives back 5 of 10"):
        model(ids(1), past_key_values=cache)


def test_what_cannot_work_is_refused_at_once() -> None:
    model = stock("llama")
    with pytest.raises(ConfigError, match="unknown cache policy"):
        hf_cache("dnse", model)
    spread = SimpleNamespace(hf_device_map={"a": "cuda:0", "b": "cuda:1"})
    with pytest.raises(ConfigError, match="one device"):
        hf_cache("dense", spread)
    other = SimpleNamespace(model_type="bert", get_text_config=lambda decoder: other)
    strange = SimpleNamespace(config=other, dtype=torch.float32, device="cpu")
    with pytest.raises(UnsupportedModel, match="bert"):
        hf_cache("dense", strange)


def test_it_is_exported_and_says_what_it_is() -> None:
    cache = narrows.cache.hf_cache("dense", stock("llama"))
    assert isinstance(cache, PolicyCache)
    assert cache.spec == "dense"
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.nbytes == 0
    assert cache.get_max_length() == -1
    with pytest.raises(AttributeError):
        _ = narrows.cache.no_such_name

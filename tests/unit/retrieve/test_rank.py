import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from narrows.errors import InputError, ModelError
from narrows.retrieve import rank
from narrows.retrieve.rank import BM25, Embedder, words
from narrows.train.textlike import read_as_text

TEXTS = ["The cat sat on the mat.", "Dogs bark at night", "A cat and a dog", "", "猫在垫子上。"]


def lucene_bm25(question, texts, k1=1.5, b=0.75):
    """The formula, term by term."""
    found = [Counter(words(t)) for t in texts]
    sizes = [sum(f.values()) for f in found]
    mean = sum(sizes) / len(sizes)
    scores = []
    for counts, size in zip(found, sizes, strict=True):
        total = 0.0
        for word in words(question):
            holding = sum(word in f for f in found)
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            tf = counts[word]
            total += idf * tf / (tf + k1 * (1 - b + b * size / mean))
        scores.append(total)
    return scores


def test_words_of_several_languages():
    assert words("The CAFE\u0301, 3.5% — naïve_x") == ["the", "café", "3", "5", "naïve_x"]
    assert words("AI在北京") == ["ai", "在", "北", "京"]
    assert words("カタ한국 Straße") == ["カ", "タ", "한", "국", "strasse"]
    assert words("?! 👍") == []


@pytest.mark.parametrize("question", ["cat", "the cat night", "cat cat dog", "猫", "zebra cat"])
def test_bm25_is_the_formula(question):
    np.testing.assert_allclose(
        BM25().score(question, TEXTS), lucene_bm25(question, TEXTS), rtol=1e-5
    )


def test_bm25_with_nothing_to_match():
    assert BM25().score("zebra", TEXTS).tolist() == [0.0] * len(TEXTS)
    assert BM25().score("?!", TEXTS).tolist() == [0.0] * len(TEXTS)
    assert BM25().score("cat", ["", "--"]).tolist() == [0.0, 0.0]
    assert BM25().score("cat", []).shape == (0,)


@pytest.fixture(scope="module")
def embedder():
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "cat", "dog", "night", "the"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    return Embedder(BertModel(config, add_pooling_layer=False), tokenizer, batch=2, max_tokens=8)


def test_embeddings_do_not_depend_on_batch_mates(embedder):
    texts = ["cat", "the dog cat night", "", "night night dog", "dog the the the cat"]
    together = embedder.embed(texts)
    alone = np.concatenate([embedder.embed([t]) for t in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)


def test_embedding_is_the_mean_over_tokens(embedder):
    ids = torch.tensor([embedder.tokenizer.encode("the cat")])
    mean = embedder.model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(
        embedder.embed(["the cat", "dog"])[0], mean / np.linalg.norm(mean), atol=1e-5
    )


def test_pooling_is_what_the_files_say(embedder, tmp_path):
    whole = BertModel(embedder.model.config)
    whole.load_state_dict(embedder.model.state_dict(), strict=False)
    whole.save_pretrained(tmp_path)
    embedder.tokenizer.save_pretrained(tmp_path)
    mean, first = "pooling_mode_mean_tokens", "pooling_mode_cls_token"

    def loaded(**told):
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(told))
        return Embedder.load(str(tmp_path), device="cpu")

    ids = torch.tensor([embedder.tokenizer.encode("the cat")])
    states = embedder.model(input_ids=ids).last_hidden_state[0]
    for told, right in (
        ({"word_embedding_dimension": 16, mean: True, first: False}, states.mean(0)),
        ({mean: False, first: True}, states[0]),
    ):
        made = loaded(**told)
        vectors = made.embed(["the cat", "dog night the cat"])
        np.testing.assert_allclose(vectors[0], (right / right.norm()).numpy(), atol=1e-5)
        table = made.model.embeddings.word_embeddings.weight
        read = read_as_text(table[ids[0, 1:-1]], [2], made)
        np.testing.assert_allclose(read[0].numpy(), vectors[0], atol=1e-5)
    for told in ({mean: True, first: True}, {"pooling_mode_max_tokens": True}, {}):
        with pytest.raises(ModelError, match="only the mean of tokens or the first token"):
            loaded(**told)
    (tmp_path / "1_Pooling" / "config.json").write_text("[")
    with pytest.raises(ModelError, match="cannot read"):
        Embedder.load(str(tmp_path))


def test_long_text_is_read_to_the_limit(embedder):
    np.testing.assert_allclose(
        embedder.embed(["cat " * 100]), embedder.embed(["cat " * 6]), atol=1e-5
    )


def test_embedder_scores_the_same_text_highest(embedder):
    scores = embedder.score("the cat", ["dog night", "the cat", "night"])
    assert scores.argmax() == 1
    assert scores[1] == pytest.approx(1.0, abs=1e-5)
    assert embedder.score("cat", []).shape == (0,)


@pytest.mark.parametrize("question", ["", " \n"])
def test_empty_question(embedder, question):
    for ranker in (BM25(), embedder):
        with pytest.raises(InputError, match="question is empty"):
            ranker.score(question, TEXTS)


def test_rankers_by_name():
    assert isinstance(rank.RANKERS.get("bm25")(), BM25)
    assert list(rank.RANKERS) == ["bm25", "minilm"]


def test_load_refuses_a_folder_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(rank.hub, "resolve", lambda name: tmp_path)
    with pytest.raises(ModelError, match="cannot read the model in") as caught:
        Embedder.load("nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.model
def test_minilm_tells_topics_apart():
    texts = ["The cat slept on the sofa.", "Interest rates rose again.", "Rain is likely."]
    assert Embedder.load().score("What did the central bank do?", texts).argmax() == 1

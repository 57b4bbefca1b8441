"""Tiny random models with a tokenizer, in folders, and tiny data folders."""

import gzip
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from narrows.bench import choices, prose, tasks

SENTENCE = "the red fox saw a blue river near Rome and two old men sold three apples for it"
WORDS = SENTENCE.split()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def speech(seed, words):
    return ". ".join(
        " ".join(WORDS[(i * 7 + j * j + seed) % len(WORDS)] for j in range(9))
        for i in range(words // 9)
    )


@pytest.fixture
def folder(tmp_path):
    def problem(i):
        return {
            "id": f"p{i}",
            "question": f"What is {i} and 1?",
            "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}",
        }

    write(tmp_path / "gsm8k/train.jsonl.gz", [problem(i) for i in range(20)])
    write(tmp_path / "gsm8k/test.jsonl", [problem(i) for i in range(100, 110)])
    template = "Read {braces}.\n{context}\nQuestion: {input}\nAnswer:"
    names = list(tasks.LONGBENCH)
    write(
        tmp_path / "longbench/templates.jsonl",
        [{"task": n, "prompt_template": template, "max_new_tokens": 8} for n in names],
    )
    for n in names:
        row = {"task": n, "context": "Anna {x} lives in Rome.", "input": "Where?"}
        rows = [{"id": f"{n}-{i}", **row, "answers": ["Rome", "in Rome"]} for i in range(2)]
        write(tmp_path / f"longbench/{n}.jsonl", rows)
    passages = [{"title": f"T{i}", "text": f"Text {i}."} for i in range(30)]
    write(tmp_path / "wiki_passages/passages.jsonl", passages)
    nq = {"question": "who", "answers": ["Wilhelm"], "gold_title": "G", "gold_text": "Wilhelm did."}
    write(
        tmp_path / "lost_in_the_middle/nq_open_oracle.jsonl",
        [{"id": f"n{i}", **nq} for i in range(3)],
    )
    pair = {"id": "k", "ordered_kv_records": [["a", "b"], ["c", "d-e"]], "key": "c", "value": "d-e"}
    write(tmp_path / "lost_in_the_middle/kv_retrieval_75.jsonl", [pair])
    write(
        tmp_path / "state_union/speeches.jsonl",
        [{"id": f"s{i}", "text": speech(i, 3000)} for i in range(3)],
    )
    return tmp_path


def saved_llama(place: Path, **sizes: int) -> str:
    """Put a random Llama beside the tokenizer of 400 tokens in ``place``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.3,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a two-layer Llama that reads 2,048 tokens."""
    place = tmp_path_factory.mktemp("tiny")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([speech(i, 200) for i in range(4)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>").save_pretrained(place)
    return saved_llama(
        place,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )


@pytest.fixture(scope="session")
def wide(tiny, tmp_path_factory):
    """The tiny model's tokenizer with a model whose heads can be quantised."""
    place = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny, place)
    return saved_llama(
        place,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )


NONSENSE = ["".join(letters) for letters in itertools.product("bdfk", "aeio", "lmnt", "aeo")]


def nonsense(seed, sentences):
    chance = random.Random(seed)
    return " ".join(" ".join(chance.choices(NONSENSE, k=6)) + "." for _ in range(sentences))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A data folder with prose and multiple choice."""
    place = tmp_path_factory.mktemp("texts")
    for number, source in enumerate(prose.SOURCES):
        rows = [{"text": nonsense(10 * number + i, 60)} for i in range(4)]
        write(place / f"{source}.jsonl", rows)
    for number, task in enumerate(choices.TASKS):
        rows = [
            {
                "question": nonsense(100 * number + i, 1),
                "choices": [nonsense(1000 * number + 10 * i + j, 1) for j in range(3)],
                "answer": i % 3,
            }
            for i in range(6)
        ]
        write(place / f"commonsense_mc/{task}.jsonl", rows)
    return place

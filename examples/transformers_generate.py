"""A quantised cache inside stock transformers: the same model, the same ``generate``, fewer bytes.

What is stored is compressed; the model's own attention is still given dense keys and values, one
layer at a time, so this is about memory. For speed use ``narrows.LLM`` with the same cache spec.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from narrows.cache import hf_cache
from narrows.model.hub import resolve

folder = resolve("smollm2-135m")  # or any folder or hub id of a supported model
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

text = Path(__file__).with_name("state_of_the_union.txt").read_text()
start = text.index("landing a man on the moon")
passage = text[start - 3000 : start + 1500]


def ask(conversation: list[dict[str, str]], question: str, cache: object) -> str:
    conversation.append({"role": "user", "content": question})
    inputs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
    reply = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    conversation.append({"role": "assistant", "content": reply})
    return reply


# A model this small feels codes of one and two bits.
for spec in ("dense", "kivi:bits=4", "xquant"):
    cache = hf_cache(spec, model)
    conversation: list[dict[str, str]] = []
    print(spec)
    first = f"{passage}\n\nWhat goal did Kennedy set about landing a man on the moon?"
    print("  1:", ask(conversation, first, cache))
    # The second turn reads only what is new.
    print("  2:", ask(conversation, "Say it in one short sentence.", cache))
    print(f"  {cache.get_seq_length()} tokens in {cache.nbytes / 2**20:.2f} MiB")

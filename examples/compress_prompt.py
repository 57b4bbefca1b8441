"""Shorten a long text to a token budget, protecting its numbers, and look at what was kept."""

from pathlib import Path

from narrows import compress

text = Path(__file__).with_name("state_of_the_union.txt").read_text()[:6000]
short = compress(text, keep_ratio=0.4, method="dac", protect="@digits", stages=3)
print(short.text)
print(f"\n{short.original_tokens} tokens -> {short.tokens}, in {len(short.kept)} spans")

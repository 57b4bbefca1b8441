"""Many prompts of unequal length in one continuous batch, with progress."""

from narrows import LLM, SamplingParams

llm = LLM("smollm2-135m")
prompts = ["The sky is", "Two plus two is", "A short poem about the sea:\n"]
outs = llm.generate(
    prompts,
    SamplingParams(max_tokens=24, temperature=0.7, top_p=0.9, seed=3),
    on_step=lambda step: print(f"\r{step.running} running", end="", flush=True),
)
for prompt, out in zip(prompts, outs, strict=True):
    print(f"\n{prompt!r} -> {out.text!r} ({out.finish_reason})")

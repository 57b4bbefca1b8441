"""``narrows.convert``: a checkpoint with fewer key and value dimensions, and what it costs."""

from __future__ import annotations

from pathlib import Path

from narrows.bench.latent_quality import Cost, compare_models
from narrows.latent import checkpoint
from narrows.latent.convert import check, parse_preset
from narrows.latent.convert import convert as convert_model
from narrows.latent.statistics import measure
from narrows.llm import LLM
from narrows.model import hub
from narrows.model.flat import FlatModel
from narrows.train import texts


def convert(
    model: str,
    out: str | Path,
    *,
    qk: int,
    vo: int,
    preset: str = "tuned",
    text: str = "own",
    data: Path | None = None,
    windows: int = 32,
    window: int = 256,
    dtype: str = "bfloat16",
    device: str | None = None,
    seed: int = 0,
) -> Cost:
    """Convert ``model`` (a known name, a hub id, a folder or a GGUF file) by KV-Latent, write it to
    the new folder ``out``, and tell what that costs before any training, on text not looked at.

    Args:
        qk: numbers of a query or key head.
        vo: numbers of a value head.
        preset: see ``narrows.latent.convert.parse_preset``.
        text: what is looked at, see ``narrows.train.texts.gather``; ``data`` is its data folder.
        windows: of ``window`` tokens of it; a quarter as many again are held out.
        dtype: in which both models run.
        seed: of the text.

    Raises ConfigError, InputError, ModelError or UnsupportedModel; then nothing is written.
    """
    out = Path(out)
    options = parse_preset(preset, qk, vo)
    checkpoint.check_place(out)
    folder = hub.resolve(model)
    base = checkpoint.load(folder)
    check(base.config, options)
    llm = LLM(model, draft="none", dtype=dtype, device=device)
    base.to(llm.model.shape.device)
    some = texts.gather(text, llm, window, windows + max(4, windows // 4), data=data, seed=seed)
    seen, held = some[:windows], some[windows:] or some
    made = convert_model(base, options, measure(base, seen) if options.looks else ())
    made.config.kv_latent["base"] = model
    checkpoint.write(made, folder, out)
    return compare_models(llm.model, FlatModel.load(str(out), dtype=dtype, device=device), held)

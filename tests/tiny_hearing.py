"""Speech encoders of transformers with random weights, small, in folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)


def whisper(folder: Path) -> Path:
    """States of 16 numbers, one every 20 ms, at most 30 s."""
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    inner = {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    config = WhisperConfig(
        d_model=16,
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **sizes,
        **heads,
        **inner,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    return folder


def wav2vec2(folder: Path) -> Path:
    """States of 12 numbers, one every 20 ms, with a head that writes letters."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=9,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder

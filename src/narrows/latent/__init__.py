"""KV-Latent: checkpoints with fewer key and value dimensions (arXiv 2507.11273)."""

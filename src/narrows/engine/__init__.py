"""The engine: scheduling, one flat forward pass a step, sampling, streaming."""

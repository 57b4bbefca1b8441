"""Models: names to weights, facts per family, the flat forward pass."""

"""Benchmarks: one module a command, each measuring ratios in one run."""

"""Caches: what is kept of the keys and values, one module a method."""

"""Which characters belong together, by the rules of Unicode as ``regex`` implements them, and
whether a choice of characters respects them; knows nothing of tokens."""

from __future__ import annotations

import regex


def clusters(text: str) -> list[tuple[int, int]]:
    """Half-open ranges of the grapheme clusters."""
    return [match.span() for match in regex.finditer(r"\X", text)]


def splits_a_cluster(text: str, spans) -> bool:
    """Whether the kept ``spans`` hold some but not all characters of a cluster."""
    kept = {i for a, b in spans for i in range(a, b)}
    return any(0 < len(kept & set(range(a, b))) < b - a for a, b in clusters(text))

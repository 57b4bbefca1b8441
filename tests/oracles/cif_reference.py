"""Integrate-and-fire as it is told: frame after frame, a bucket that may fill several times."""

from __future__ import annotations


def fire_one(weights, states, *, bucket=1.0, tail="drop"):
    """Tokens of one item, each the list of what it takes of every frame, and their embeddings.

    ``weights`` are floats, ``states`` lists of floats. "drop" leaves a bucket that is not full,
    "zero_frame" lets it go as it is from 0.55 of a bucket on, "rescale" fills it up from 0.5 on.
    """
    rows, row, filled = [], [0.0] * len(weights), 0.0
    for t, weight in enumerate(weights):
        while filled + weight >= bucket * (1 - 1e-9):
            poured = bucket - filled
            row[t] += poured
            rows.append(row)
            weight = max(0.0, weight - poured)
            row, filled = [0.0] * len(weights), 0.0
        row[t] += weight
        filled += weight
    if tail == "zero_frame" and filled >= 0.55 * bucket:
        rows.append(row)
    elif tail == "rescale" and filled >= 0.5 * bucket:
        rows.append([share * bucket / filled for share in row])
    size = len(states[0]) if states else 0
    embeds = [
        [sum(r[t] * states[t][i] for t in range(len(weights))) for i in range(size)] for r in rows
    ]
    return rows, embeds

"""Where kernels write the new tokens of a batch: places of all its sequences, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from narrows.ops.packed import PackedLayer
from narrows.ops.ragged import Place


class Places:
    """``dense`` and ``coded`` places, those of the first layer first; layer ``i``'s end at
    ``dense_ends[i]`` and ``coded_ends[i]``."""

    __slots__ = ("coded", "coded_ends", "dense", "dense_ends")

    def __init__(self) -> None:
        self.dense: list[Place] = []
        self.coded: list[PackedLayer] = []
        self.dense_ends: list[int] = []
        self.coded_ends: list[int] = []

    def add(self, places: Sequence[Place | PackedLayer]) -> None:
        """Take in those of one cache."""
        for place in places:
            if isinstance(place, Place):
                self.dense.append(place)
            else:
                self.coded.append(place)

    def end_layer(self) -> None:
        """What is added from now on belongs to the next layer."""
        self.dense_ends.append(len(self.dense))
        self.coded_ends.append(len(self.coded))

    @property
    def dtype(self) -> torch.dtype:
        """Of what is written."""
        return self.dense[0].k.dtype if self.dense else self.coded[0].k_tail.dtype

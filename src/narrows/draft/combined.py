"""Several drafters as one: each offers, and the better offer is taken, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from narrows.contracts import Asked, Draft, Drafter, Kept, Offer, Reading
from narrows.errors import ConfigError


class Combined(Drafter):
    """Offers what all of ``drafters`` offer. Raises ConfigError if two of them tap the target, or
    share a name."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        tapping = [one for one in drafters if one.taps]
        if len(tapping) > 1 or len({one.name for one in drafters}) < len(drafters):
            raise ConfigError("combine different drafters, and at most one that taps the model")
        self.drafters = list(drafters)
        self.name = "+".join(one.name for one in drafters)
        self.most = max(one.most for one in drafters)
        self.taps = tapping[0].taps if tapping else ()
        self._tapping = tapping[0] if tapping else None

    def estimate(self, tokens: int) -> int:
        """See Drafter."""
        return sum(one.estimate(tokens) for one in self.drafters)

    def wants(self, work: Sequence[Reading]) -> list[int]:
        """See Drafter."""
        return self._tapping.wants(work) if self._tapping else super().wants(work)

    def read(self, taps: Tensor, kept: Sequence[Kept]) -> None:
        """See Drafter."""
        if self._tapping:
            self._tapping.read(taps, kept)

    def offer(self, asked: Sequence[Asked]) -> list[list[Offer]]:
        """See Drafter."""
        each = [one.offer(asked) for one in self.drafters]
        return [
            [offer for offers in column for offer in offers] for column in zip(*each, strict=True)
        ]

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See Drafter. Each kind is asked of the drafter that offered it."""
        made: dict[int, Draft] = {}
        for one in self.drafters:
            mine = [i for i, a in enumerate(asked) if a.kind.startswith(one.name)]
            if mine:
                made |= zip(mine, one.propose([asked[i] for i in mine]), strict=True)
        return [made[i] for i in range(len(asked))]

    def forget(self, number: int) -> None:
        """See Drafter."""
        for one in self.drafters:
            one.forget(number)

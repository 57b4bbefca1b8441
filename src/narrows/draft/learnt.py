"""Shares and times that are learnt from what happens, the latest weighing most."""

from __future__ import annotations

from collections import defaultdict

MEMORY = 0.98
"""Weight of the past at each new trial, and at each new step."""
FADING = 0.999
"""Weight of the past at each step that leaves a sort or a kind untried: of its misses and of what
making it cost, so that it is tried again."""
ROW_COST = 0.02
"""What a row adds to a step, of a step of one row, until steps have shown it. Rather little, since
where steps are all of a size only a guess that is risked shows more."""
TRUST = 0.5
"""Spread of rows (their variance) at which steps taken count as much as ROW_COST."""
OTHERWISE = 0.01
"""Spread of sequences likewise, at which steps taken count as much as that these cost no more than
their rows. Little, as most do: where rows came with sequences alone, what they cost is told of
sequences, and what a guess costs is not known."""
LEAST = 0.1
"""Share of the mean time below which nothing is expected to be done."""
BUCKET = 4
"""Rows that are taken to be as far off the plane: kernels work on several at once, so that the
first of some more costs most."""
BELIEF = 6.0
"""Observations of a bucket that count as much as the plane."""
FIRST = 0.6
"""Of what rows that are multiplied together add to a step, what the first of them adds."""
SLOW, ODD = 1.5, 1.25
"""Times as long as expected that anything is taken to have taken at most, and what of it may be a
bucket's own: what else the machine does now and then must not seem to come of so many rows."""


class Record:
    """Hits and trials of one thing."""

    def __init__(self, hits: float, trials: float) -> None:
        self.hits, self.trials = hits, trials

    def add(self, hit: float, trials: float = 1.0) -> None:
        """Note what came of so many."""
        self.hits = self.hits * MEMORY + hit
        self.trials = self.trials * MEMORY + trials

    def fade(self, hits: float, trials: float) -> None:
        """Come a little nearer to ``hits`` of ``trials``."""
        self.hits = hits + (self.hits - hits) * FADING
        self.trials = trials + (self.trials - trials) * FADING


ROWS, SEQUENCES, SECONDS = range(3)


class Times:
    """Seconds by rows of tokens and the sequences they are of, learnt from what was done: a plane
    through the mean, the latest weighing most, by rows steeper or flatter than ROW_COST has it as
    far as different rows of as many sequences have shown that; and, by buckets of rows, how many
    times as long as by the plane it took. More rows are never expected to take less. Where
    ``together`` rows are multiplied at once, most of what one of them takes is taken by the first.
    """

    def __init__(self, together: int = 1) -> None:
        self.together = together
        self._weight = 0.0
        self._mean = [0.0, 0.0, 0.0]
        """Of ROWS, SEQUENCES and SECONDS."""
        self._joint = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        """Covariances of ROWS and of SEQUENCES with all of them."""
        self._apart: dict[int, Record] = defaultdict(lambda: Record(BELIEF, BELIEF))
        self._stairs: dict[int, list[tuple[float, float]]] = defaultdict(list)
        """By sequences and then by bucket, seconds expected of fewer rows and times as long as by
        the plane, as far as anyone has asked since anything was learnt."""
        self.slope = ROW_COST
        """Seconds for one more row."""
        self._each = 0.0
        """Seconds for one more sequence, beyond those for its rows."""

    @property
    def known(self) -> bool:
        """Whether anything has been observed."""
        return self._weight > 0

    def fade(self) -> None:
        """Expect a little less."""
        self._mean[SECONDS] *= FADING
        for row in self._joint:
            row[SECONDS] *= FADING
        self._draw()

    def observe(self, rows: int, seconds: float, sequences: int = 0) -> None:
        """Note what ``rows`` of so many ``sequences`` took."""
        if self._weight:
            expected = self(rows, sequences)
            seconds = min(seconds, SLOW * expected)
            for record in self._apart.values():
                record.fade(BELIEF, BELIEF)
            apart = min(seconds, ODD * expected) / self.plane(rows, sequences)
            self._apart[(rows - 1) // BUCKET].add(apart)
        self._weight = self._weight * MEMORY + 1
        share = 1 / self._weight
        seen = (self._counted(rows), sequences, seconds)
        more = [one - usual for one, usual in zip(seen, self._mean, strict=True)]
        self._mean = [usual + share * x for usual, x in zip(self._mean, more, strict=True)]
        self._joint = [
            [(1 - share) * (old + share * x * y) for old, y in zip(row, more, strict=True)]
            for row, x in zip(self._joint, more[:SECONDS], strict=True)
        ]
        self._draw()

    def _draw(self) -> None:
        """The plane, and nothing answered by it yet."""
        self._stairs.clear()
        if not self._weight:
            return
        rows, _, seconds = self._mean
        usual = ROW_COST * seconds / (1 + ROW_COST * (rows - 1))
        by_rows, by_sequences = self._joint
        both, longer = by_rows[SEQUENCES], by_rows[SECONDS] + TRUST * usual
        own, others = by_rows[ROWS] + TRUST, by_sequences[SEQUENCES] + OTHERWISE
        self._each = max(
            0.0, (own * by_sequences[SECONDS] - both * longer) / (own * others - both**2)
        )
        self.slope = max(0.0, (longer - both * self._each) / own)

    def __call__(self, rows: int, sequences: int = 0) -> float:
        """Seconds expected of ``rows`` of so many ``sequences``, in an arbitrary unit before the
        first observation."""
        bucket = max(rows - 1, 0) // BUCKET
        stairs = self._stairs[sequences]
        while len(stairs) <= bucket:
            last = BUCKET * len(stairs)
            apart = self._apart.get(len(stairs))
            off = apart.hits / apart.trials if apart else 1.0
            stairs.append((self(last, sequences) if last else 0.0, off))
        fewer, off = stairs[bucket]
        return max(fewer, off * self.plane(rows, sequences))

    def plane(self, rows: int, sequences: int = 0) -> float:
        """The same by the plane alone."""
        counted = self._counted(rows)
        if not self._weight:
            return 1 + ROW_COST * (counted - 1)
        mean_rows, mean_sequences, seconds = self._mean
        more = self.slope * (counted - mean_rows) + self._each * (sequences - mean_sequences)
        return max(seconds + more, LEAST * seconds)

    def _counted(self, rows: int) -> float:
        """Rows, those that would be multiplied with them counting FIRST each."""
        return rows + FIRST * (-rows % self.together)

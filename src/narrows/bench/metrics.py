"""Scores of a predicted answer against gold answers, and bootstrap intervals of their means.

Every score is a share in [0, 1]; with several gold answers the best one counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Interval = tuple[float, float]


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: SQuAD's rule."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the normalized words, as multisets."""
    guess, gold = normalize(prediction).split(), normalize(answer).split()
    if not guess or not gold:
        return float(guess == gold)
    shared = sum((Counter(guess) & Counter(gold)).values())
    return 2 * shared / (len(guess) + len(gold))


def exact_match(prediction: str, answer: str) -> float:
    """Whether the normalized texts are equal."""
    return float(normalize(prediction) == normalize(answer))


def inclusion(prediction: str, answer: str) -> float:
    """Whether the normalized answer stands, as whole words, in the normalized prediction."""
    return float(f" {normalize(answer)} " in f" {normalize(prediction)} ")


def rouge_l(prediction: str, answer: str) -> float:
    """F-measure of the longest common subsequence of the normalized words."""
    return _lcs_share(normalize(prediction).split(), normalize(answer).split())


def edit_similarity(prediction: str, answer: str) -> float:
    """``1 - (insertions + deletions) / (both lengths)`` over the characters of the prediction's
    first line that is not blank, and of the answer."""
    lines = [line for line in prediction.splitlines() if line.strip()]
    return _lcs_share(lines[0].strip() if lines else "", answer.strip())


def number_match(prediction: str, answer: str) -> float:
    """The share of the numbers in the prediction that are the answer's number."""
    gold, found = _NUMBER.findall(answer), _NUMBER.findall(prediction)
    return found.count(gold[0]) / len(found) if gold and found else 0.0


def last_number(text: str) -> str | None:
    """The number a worked solution ends with: the first after ``####``, else the last one,
    without commas and without a fraction of zero. None if there is none."""
    _, marker, tail = text.rpartition("####")
    marked: list[str] = _NUMBER.findall(tail) if marker else []
    found: list[str] = marked[:1] or _NUMBER.findall(text)[-1:]
    if not found:
        return None
    number = found[0].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def final_number(prediction: str, answer: str) -> float:
    """Whether both solutions end with the same number."""
    number = last_number(prediction)
    return float(number is not None and number == last_number(answer))


METRICS: dict[str, Callable[[str, str], float]] = {
    "token_f1": token_f1,
    "exact_match": exact_match,
    "inclusion": inclusion,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "number_match": number_match,
    "final_number": final_number,
}
"""The scores by the name a task gives."""


def best(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """The score of ``prediction`` against the gold answer it matches best."""
    return max(METRICS[metric](prediction, answer) for answer in answers)


def _lcs_share(a: Sequence[str], b: Sequence[str]) -> float:
    """Twice the length of the longest common subsequence over both lengths (1.0 for two
    empties)."""
    if not a or not b:
        return float(len(a) == len(b))
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def bootstrap(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values``.

    ``groups[i]`` names what value ``i`` shares with others (the same context, say): groups are
    drawn whole, since their values are not independent. None takes each value by itself. The
    same seed gives the same interval. An empty sample gives ``(nan, nan)``.
    """
    if not values:
        return (float("nan"), float("nan"))
    labels: Sequence[Hashable] = range(len(values)) if groups is None else groups
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    sums, counts = np.zeros(len(index)), np.zeros(len(index))
    for value, label in zip(values, labels, strict=True):
        sums[index[label]] += value
        counts[index[label]] += 1
    random = np.random.default_rng(seed)
    draws: NDArray[np.int64] = random.integers(len(index), size=(resamples, len(index)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def bootstrap_quantile(
    values: Sequence[float],
    share: float,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the ``share`` quantile of ``values``, drawn as
    ``bootstrap`` draws."""
    if not values:
        return (float("nan"), float("nan"))
    labels: Sequence[Hashable] = range(len(values)) if groups is None else groups
    pools: dict[Hashable, list[float]] = {}
    for value, label in zip(values, labels, strict=True):
        pools.setdefault(label, []).append(value)
    groups_of = [np.array(pool) for pool in pools.values()]
    random = np.random.default_rng(seed)
    draws = random.integers(len(groups_of), size=(resamples, len(groups_of)))
    found = [np.quantile(np.concatenate([groups_of[i] for i in draw]), share) for draw in draws]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def paired_bootstrap(
    ours: Sequence[float],
    theirs: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, Interval]:
    """Mean of ``ours - theirs``, item by item, and its bootstrap interval (see ``bootstrap``)."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = float(np.mean(gaps)) if gaps else float("nan")
    return mean, bootstrap(gaps, groups, seed=seed, resamples=resamples, level=level)

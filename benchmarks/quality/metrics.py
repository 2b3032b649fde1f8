"""What is computed from the distributions of the next tokens, and how sure a mean is."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from torch import Tensor


def divergence(full_AV: Tensor, other_AV: Tensor) -> Tensor:
    """KL(full || other) in nats for each of A tokens, from log-probabilities over the vocabulary. -> [A]."""
    return (full_AV.exp() * (full_AV - other_AV)).sum(dim=-1)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def worst(values: Sequence[float], share: float = 0.05) -> float:
    """Mean of the largest `share` of the values (at least one)."""
    return mean(sorted(values, reverse=True)[: max(1, round(share * len(values)))])


def interval(
    values: Sequence[float], groups: Sequence[Hashable], *, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the mean, in which whole groups (documents) are drawn: questions about one document are
    not independent."""
    by_group: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    sums = [(sum(members), len(members)) for members in by_group.values()]
    if not sums:
        return float("nan"), float("nan")
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        chosen = rng.choices(sums, k=len(sums))
        means.append(sum(s for s, _ in chosen) / sum(n for _, n in chosen))
    return _middle(means, level)


def stratified_interval(
    strata: Sequence[Sequence[float]], *, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the mean of the strata's means, in which values are drawn within their stratum (a task):
    which tasks there are is not left to chance."""
    rng = random.Random(0)
    return _middle([mean([mean(rng.choices(values, k=len(values))) for values in strata]) for _ in range(draws)], level)


def _middle(values: Sequence[float], level: float) -> tuple[float, float]:
    """What the middle `level` of the values lies between."""
    ordered, tail = sorted(values), (1 - level) / 2
    return ordered[int(tail * len(ordered))], ordered[min(len(ordered) - 1, int((1 - tail) * len(ordered)))]

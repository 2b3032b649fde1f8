"""The policies once more, in float64 and plain loops, written from the formulas and from nothing in the package.

One function a formula, one number at a time. A head of one layer is a list of scores; nothing is paged, forced tokens
are kept first.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tests.policy.naive_blocks import Layer, Rows, attention, pool, value_norm
from tests.policy.naive_formulas import FORMULAS

__all__ = ["Layer", "attention", "kept_sets", "scores", "value_norm"]


def mean_scores(rows: Rows, kernel: int) -> np.ndarray:
    heads, _, window, _ = rows.shape
    return np.array(
        [sum(pool(rows[h, :, w].mean(axis=0), kernel) for w in range(window)) / window for h in range(heads)]
    )


def accumulated_scores(layer: Layer, scale: float, n: int) -> np.ndarray:
    """What each of the first n tokens gets from all queries there are, on average over the group."""
    query = layer.query if layer.earlier is None else np.concatenate([layer.earlier, layer.query])
    rows = attention(replace(layer, query=query), scale)
    return rows.sum(axis=2).mean(axis=1)[:, :n]


def defensive_scores(rows: Rows, kernel: int) -> np.ndarray:
    heads, group, window, n = rows.shape
    scores = np.zeros((heads, n))
    for h in range(heads):
        peak = np.zeros(n)
        for g in range(group):
            for w in range(window):
                pooled = pool(rows[h, g, w], kernel)
                peak = np.maximum(peak, pooled / pooled.sum() * rows[h, g, w].sum())
        scores[h] = np.maximum(peak, peak.mean())
    return scores


def halo(row: np.ndarray, reach: int, weight: float) -> np.ndarray:
    """Each token gets at least `weight` of the best within `reach` tokens."""
    return np.array([max(row[t], weight * max(row[max(t - reach, 0) : t + reach + 1])) for t in range(len(row))])


def variance(rows: np.ndarray, axis: int) -> np.ndarray:
    """Unbiased; of a single row 0, for it does not change."""
    return rows.var(axis=axis, ddof=min(1, rows.shape[axis] - 1))


def cake_scores(rows: Rows, kernel: int) -> np.ndarray:
    heads, group, _, _ = rows.shape
    return np.array(
        [sum(pool(r.mean(axis=0) + 200 * variance(r, 0), kernel) for r in rows[h]) / group for h in range(heads)]
    )


def cake_preference(rows: Rows) -> float:
    """How much of the budget a layer wants: its attention's entropy, and its variance over the window."""
    entropy = -sum(a * math.log(a) for a in rows.flatten() if a > 0)
    return entropy ** (1 / 1.6) * variance(rows, 2).sum() ** (1 / 0.6)


def layer_budgets(policy, weights: list[float], *, total: int, forced: int, most: int) -> list[int]:
    """`total` tokens split over layers, one after the other to the layer that is furthest below its proportion."""
    layers = len(weights)
    if policy.layer_budget == "linear":
        weights = [2 - 1 / 20 - (2 - 2 / 20) * i / (layers - 1) if layers > 1 else 1.0 for i in range(layers)]
    if max(weights) == 0:
        weights = [1.0] * layers
    budgets = [forced] * layers
    for _ in range(total - forced * layers):
        open_layers = [i for i in range(layers) if budgets[i] < most]
        best = max(open_layers, key=lambda i: (weights[i] / (budgets[i] + 0.5), -i))
        budgets[best] += 1
    return budgets


def certain_tokens(rows: Rows, full_rows: Rows, keep_ratio: float, window_bias: str) -> list[set[int]]:
    """Stage 1 of DefensiveKV: for each head the tokens that are kept for certain."""
    heads, _, window, n = rows.shape
    # What goes to the window, and to nothing, is what does not go to the tokens before it.
    before = rows[..., -window:].sum(axis=-1) if window_bias == "reference" else 1 - full_rows[..., :n].sum(axis=-1)
    threshold = 0.9 - before.mean()
    cap = max(int(n * (1 - (1 - keep_ratio)) - window), 0)
    certain = []
    for h in range(heads):
        mass = rows[h].mean(axis=(0, 1))
        mass = mass / mass.sum()
        chosen: set[int] = set()
        total = 0.0
        for t in sorted(range(n), key=lambda t: (-mass[t], t)):
            total += mass[t]
            if total >= threshold or len(chosen) == cap:
                break
            chosen.add(t)
        certain.append(chosen)
    return certain


def scores(
    policy, layer: Layer, *, index: int, scale: float, keep_ratio: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """(scores, second-stage ranks or None), float64 [H, n], of a policy over the tokens before the window."""
    window, heads, tokens = layer.query.shape[0], *layer.key.shape[:2]
    n = tokens - window
    if policy.aggregate == "recency":
        return lift_first(policy, np.array([list(range(n))] * heads, dtype=float)), None
    if policy.aggregate in FORMULAS:
        return lift_first(policy, FORMULAS[policy.aggregate](policy, layer, index, scale)), None
    if policy.aggregate == "uniform":
        return np.ones((heads, n)), None
    if policy.aggregate == "accumulated":
        return accumulated_scores(layer, scale, n), None
    echo = np.sum(layer.key**2, axis=-1) / np.sum(layer.key**2, axis=(1, 2))[:, None]
    if policy.aggregate == "echo":
        if policy.value_weight == "none" or layer.output is None:
            return echo[:, :n], None
        norm = value_norm(layer, n, 2)
        return echo[:, :n] * (norm / norm.sum(axis=0)), None
    full_rows = attention(layer, scale)
    rows = full_rows[..., :n]
    weighted = layer.output is not None and policy.value_weight != "none"
    norm = value_norm(layer, n, 1 if policy.value_weight == "l1" else 2) if weighted else None
    if policy.aggregate == "mean":
        plain = mean_scores(rows, policy.pool_kernel)
        return plain, None if norm is None else (plain + 1e-4) * norm
    if policy.aggregate == "cake":
        return cake_scores(rows, policy.pool_kernel), None
    risk = defensive_scores(rows, policy.pool_kernel)
    risk = np.array([halo(row, policy.halo_tokens, policy.halo_weight) for row in risk])
    if policy.reconstruction != "none" or policy.learned:
        risk = np.maximum(risk, echo[:, :n])
    if norm is not None:
        risk = risk * (norm / norm.sum(axis=0))
    if policy.stages == "none":
        return risk, None
    certain = certain_tokens(rows, full_rows, keep_ratio, policy.window_bias)
    best = risk.max()
    for h in range(heads):
        for t in certain[h]:
            risk[h, t] = best
    return risk, None


def lift_first(policy, values: np.ndarray) -> np.ndarray:
    """The policy's first tokens above all others of their head."""
    lifted = values.copy()
    lifted[:, : policy.sinks] = values.max(axis=1, keepdims=True) + 1
    return lifted


def layer_weight(policy, layer: Layer, scale: float) -> float:
    """What a layer's budget is proportional to, where that is its own."""
    if policy.layer_budget == "entropy":
        share = FORMULAS[policy.aggregate](policy, layer, 0, scale)
        share = share / share.sum()
        return -sum(s * math.log(s) for s in share.flatten() if s > 0) / math.log(share.size)
    return cake_preference(attention(layer, scale)[..., : -layer.query.shape[0]])


def budgets_by_type(local: list[list[bool]], *, total: int, least: int, most: int) -> dict[tuple[int, int], int]:
    """`total` tokens: `least` for each head, then one after the other to the shortest that is not local and not full,
    and only when there is none to the shortest that is local."""
    types = {(i, h): each for i, heads in enumerate(local) for h, each in enumerate(heads)}
    budgets = dict.fromkeys(types, least)
    for _ in range(total - least * len(types)):
        open_heads = [at for at in types if budgets[at] < most]
        budgets[min(open_heads, key=lambda at: (types[at], budgets[at], at))] += 1
    return budgets


def kept_sets(
    policy,
    layers: list[tuple[np.ndarray, np.ndarray | None]],
    *,
    tokens: int,
    window: int,
    keep_ratio: float,
    weights: list[float] | None = None,
    local: list[list[bool]] | None = None,
) -> dict[tuple[int, int], set[int]]:
    """Token by token, with the reference's budgets, window included. weights: of the layers, local: of their heads,
    where a policy has any.

    -> {(layer, head): positions}.
    """
    heads, n = layers[0][0].shape
    forced = set(range(n, tokens))
    fraction = 1 - (1 - keep_ratio)
    everyone = [(i, h) for i in range(len(layers)) for h in range(heads)]
    best = {(i, h): sorted(range(n), key=lambda t, s=layers[i][0][h]: (-s[t], t)) for i, h in everyone}
    if policy.layer_budget != "even":
        total = int(tokens * fraction) * len(layers)
        each = layer_budgets(policy, weights or [0.0] * len(layers), total=total, forced=window, most=tokens)
    else:
        each = [int(tokens * fraction)] * len(layers)
    if policy.head_budget == "typed":
        total = int(tokens * fraction * heads * len(layers))
        budgets = budgets_by_type(local or [], total=total, least=window + 1, most=tokens)
        return {at: forced | set(best[at][: budgets[at] - window]) for at in everyone}
    if policy.scope == "head":
        return {at: forced | set(best[at][: each[at[0]] - window]) for at in everyone}
    units = (
        [everyone] if policy.scope == "model" else [[at for at in everyone if at[0] == i] for i in range(len(layers))]
    )
    kept = {at: set(forced) for at in everyone}
    for unit in units:
        budget = int(tokens * fraction * heads * (len(layers) if policy.scope == "model" else 1))
        if policy.layer_budget != "even":
            budget = each[unit[0][0]] * heads
        guard = max(int(policy.guard * each[unit[0][0]]) - window, 0)
        for at in unit:
            kept[at] |= set(best[at][:guard])
        others = [(at, t) for at in unit for t in best[at][guard:]]
        others.sort(key=lambda c: (-layers[c[0][0]][0][c[0][1], c[1]], c[0], c[1]))
        for at, t in others[: budget - sum(len(kept[at]) for at in unit)]:
            kept[at].add(t)
    if policy.stages == "half-budget" and layers[0][1] is not None:
        for i, h in everyone:
            budget = len(kept[i, h])
            rank = layers[i][1][h]
            certain = forced | set(best[i, h][: max(math.floor(budget / 2) - window, 0)])
            rest = sorted(set(range(n)) - certain, key=lambda t, r=rank: (-r[t], t))
            kept[i, h] = certain | set(rest[: budget - len(certain)])
    return kept

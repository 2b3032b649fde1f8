"""One function an aggregate: (policy, layer, index, scale) -> float64 [H, n], of the tokens before the window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.policy.naive_blocks import Layer, attention, largest_around, logit, pool, projected

Formula = Callable[[Any, Layer, int, float], np.ndarray]


def sizes(layer: Layer) -> tuple[int, int, int, int]:
    """H, G, W, n"""
    (window, queries, _), (heads, tokens, _) = layer.query.shape, layer.key.shape
    return heads, queries // heads, window, tokens - window


def pooled(policy: Any, score: np.ndarray) -> np.ndarray:
    return (largest_around if policy.pool == "max" else pool)(score, policy.pool_kernel)


def random(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, _, _, n = sizes(layer)
    return np.array([[hashed((index * 1000 + h) * 1_000_003 + t) for t in range(n)] for h in range(heads)])


def hashed(key: int) -> float:
    for factor in (0x9E3779B1, 0x85EBCA77):
        key = ((key ^ (key >> 15)) * factor) % 2**32
    return ((key ^ (key >> 16)) >> 8) / 2**24


def laprox(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, group, window, n = sizes(layer)
    rows, scores = attention(layer, scale), np.zeros((heads, n))
    for h in range(heads):
        for t in range(n):
            for g in range(group):
                column = sum(rows[h, g, w, t] ** 2 for w in range(window)) ** 0.5
                weight = 1.0 if layer.output is None else np.linalg.norm(projected(layer, h, g, layer.value[h, t]))
                scores[h, t] += column * weight / group
        scores[h] = pooled(policy, scores[h])
    return scores / scores.sum()


def exposure(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, group, window, n = sizes(layer)
    rows, tokens = attention(layer, scale), n + window
    mean = np.zeros((heads, tokens))
    for h in range(heads):
        for t in range(tokens):
            seeing = [w for w in range(window) if n + w >= t]
            mean[h, t] = sum(rows[h, g, w, t] for g in range(group) for w in seeing) / (group * len(seeing))
    pooled_five = np.zeros_like(mean)
    for t in range(tokens):
        around = [abs(t + i) for i in range(-2, 3)]
        around = [u if u < tokens else 2 * (tokens - 1) - u for u in around]
        pooled_five[:, t] = mean[:, around].mean(axis=1)
    return pooled_five[:, :n]


def tova(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, group, _, n = sizes(layer)
    rows = attention(layer, scale)
    mean = sum(rows[h, g, -1, :n] for h in range(heads) for g in range(group)) / (heads * group)
    return np.array([mean] * heads)


def rkv(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, group, window, n = sizes(layer)
    scores, recent = np.zeros((heads, n)), range(max(0, window - 8), window)
    for h in range(heads):
        attention = np.zeros(n)
        for w in recent:
            products = [max(layer.query[w, h * group + g] @ key for g in range(group)) for key in layer.key[h, :n]]
            logits = [logit(layer, product, scale) for product in products]
            attention += softmax(np.array(logits)) / len(recent)
        unit = layer.key[h] / np.linalg.norm(layer.key[h], axis=1, keepdims=True)
        cosines = unit @ unit.T
        for i, row in enumerate(cosines):
            row[i] = 0
            if alike := [j for j in range(len(row)) if row[j] > 0.5]:
                row[alike[-1]] = 0
        scores[h] = 0.07 * pooled(policy, attention) - 0.93 * softmax(cosines.mean(axis=0)[:n])
    return scores


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def lava(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, group, _, n = sizes(layer)
    rows = attention(layer, scale)
    scores = np.zeros((heads, n))
    for h in range(heads):
        for g in range(group):
            scores[h] = np.maximum(scores[h], largest_around(rows[h, g, :, :n].mean(axis=0), 7))
        scores[h] *= max(np.abs(value).sum() for value in layer.value[h])
    return scores


def without(layer: Layer, row: np.ndarray, h: int, t: int) -> np.ndarray:
    """The output if token t were not there: softmax over the others, and nothing."""
    left, nothing = row.copy(), 0.0 if layer.void is None else 1 - row.sum()
    left[t] = 0
    return left @ layer.value[h] / (left.sum() + nothing)


def by_removal(damage: Callable[..., float]) -> Formula:
    """Remove one token after the other. damage: of (A, z, output, output without the token, projection of a vector)."""

    def formula(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
        heads, group, window, n = sizes(layer)
        rows, scores = attention(layer, scale), np.zeros((heads, n))
        for h in range(heads):
            for t in range(n):
                for g in range(group):
                    for w in range(window):
                        row = rows[h, g, w]
                        z = logit(layer, layer.key[h, t] @ layer.query[w, h * group + g], scale)
                        output, other = row @ layer.value[h], without(layer, row, h, t)
                        scores[h, t] += damage(
                            row[t], z, layer.value[h, t], output, projected(layer, h, g, output - other)
                        )
            scores[h] = pooled(policy, scores[h] / divisor(policy, group, window))
        return scores

    return formula


def divisor(policy: Any, group: int, window: int) -> int:
    return {"deletion": group * window, "dropkv": group, "obcache": 1}[policy.aggregate]


deletion = by_removal(lambda a, z, value, output, moved: float(np.linalg.norm(moved)))
dropkv = by_removal(lambda a, z, value, output, moved: (a / (1 - a + 1e-6)) ** 2 * ((value - output) ** 2).sum())
obcache = by_removal(lambda a, z, value, output, moved: (a * z) ** 2 * ((value - output) ** 2).sum())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def keydiff(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, _, _, n = sizes(layer)
    scores = []
    for h in range(heads):
        mean = sum(key / np.linalg.norm(key) for key in layer.key[h]) / len(layer.key[h])
        scores.append([-cosine(layer.key[h, t], mean) for t in range(n)])
    return np.array(scores)


def capacity(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, group, _, n = sizes(layer)
    tokens, first = layer.key.shape[1], 4
    scores = np.zeros((heads, n))
    for h in range(heads):
        for g in range(group):
            mean = layer.query[:, h * group + g].mean(axis=0)
            cosines = {t: cosine(layer.key[h, t], mean) for t in range(first, tokens)}
            weight = {t: np.exp(5 * (c - max(cosines.values()))) for t, c in cosines.items()}
            gram = np.eye(layer.value.shape[2])
            for t in weight:
                gram += (weight[t] + 1e-6) * np.outer(layer.value[h, t], layer.value[h, t])
            inverse = np.linalg.inv(gram)
            for t in range(first, n):
                scores[h, t] += weight[t] * layer.value[h, t] @ inverse @ layer.value[h, t] / group
    return scores


def expected(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, group, window, n = sizes(layer)
    tokens, first = layer.key.shape[1], 4
    scores = np.zeros((heads, n))
    for h in range(heads):
        for g in range(group):
            query = layer.query[:, h * group + g]
            mean = query.mean(axis=0)
            spread = sum(np.outer(q - mean, q - mean) for q in query) / window
            logits = {}
            for t in range(first, tokens):
                key = layer.key[h, t]
                logits[t] = scale * key @ mean + scale**2 * key @ spread @ key / 2
            largest = max(logits.values())
            total = sum(np.exp(z - largest) for z in logits.values())
            for t in range(first, n):
                scores[h, t] += np.exp(logits[t] - largest) / total / group
        for t in range(n):
            scores[h, t] *= np.linalg.norm(layer.value[h, t])
    return scores


def headkv(policy: Any, layer: Layer, index: int, scale: float) -> np.ndarray:
    heads, group, window, n = sizes(layer)
    rows, scores = attention(layer, scale), np.zeros((heads, n))
    halves = [[t for t in range(n) if t < n / 2], [t for t in range(n) if t >= n / 2]]
    for h in range(heads):
        for half in halves:
            share = np.zeros(len(half))
            for g in range(group):
                for w in range(window):
                    share += rows[h, g, w, half] / sum(rows[h, g, w, half])
            for t, b in zip(half, share, strict=True):
                scores[h, t] = sum(other < b for other in share) / len(half)
    return scores


def local_heads(layer: Layer, scale: float) -> list[bool]:
    """HeadKV's types: whether 0.9 of a head's attention, the first four tokens aside, lies on its newest tokens."""
    heads, _, window, _ = sizes(layer)
    rows, tokens = attention(layer, scale), layer.key.shape[1]
    types = []
    for h in range(heads):
        mean = rows[h].mean(axis=(0, 1))
        mean[:4] = 0
        count, mass = 0, 0.0
        while mass < 0.9 * mean.sum():
            count += 1
            mass += mean[tokens - count]
        types.append(count <= max(2 * window, tokens / 16))
    return types


FORMULAS: dict[str, Formula] = {
    "random": random,
    "l2": laprox,
    "exposure": exposure,
    "last": tova,
    "redundancy": rkv,
    "group-peak": lava,
    "deletion": deletion,
    "dropkv": dropkv,
    "obcache": obcache,
    "key-difference": keydiff,
    "capacity-window": capacity,
    "expected-window": expected,
    "stratified": headkv,
}

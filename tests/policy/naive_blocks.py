"""What the naive formulas are made of: attention, pooling and value norms in float64 and plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Rows = np.ndarray  # [H, G, W, n], attention of the window's queries to the tokens before it


@dataclass
class Layer:
    """Inputs of one layer, float64. query [W, Q, D], key and value [H, S, D], output [Q, D, M] or None.

    earlier: queries of tokens before the window, `[_, Q, D]`, where the test has them. cap: of logits, 0 for none. void
    [Q]: the logit of nothing of each query head, or None.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray | None
    earlier: np.ndarray | None = None
    cap: float = 0.0
    void: np.ndarray | None = None


def logit(layer: Layer, product: float, scale: float) -> float:
    return layer.cap * np.tanh(product * scale / layer.cap) if layer.cap else product * scale


def attention(layer: Layer, scale: float) -> Rows:
    window, query_heads, _ = layer.query.shape
    heads, tokens, _ = layer.key.shape
    group = query_heads // heads
    rows = np.zeros((heads, group, window, tokens))
    for h in range(heads):
        for g in range(group):
            for w in range(window):
                seen = tokens - window + w + 1
                products = layer.key[h, :seen] @ layer.query[w, h * group + g]
                logits = np.array([logit(layer, product, scale) for product in products])
                weights = np.exp(logits - logits.max())
                void = 0.0 if layer.void is None else np.exp(layer.void[h * group + g] - logits.max())
                rows[h, g, w, :seen] = weights / (weights.sum() + void)
    return rows


def pool(row: np.ndarray, kernel: int) -> np.ndarray:
    reach, n = kernel // 2, len(row)
    return np.array([sum(row[max(t - reach, 0) : min(t + reach + 1, n)]) / kernel for t in range(n)])


def value_norm(layer: Layer, n: int, order: int) -> np.ndarray:
    assert layer.output is not None
    heads = layer.key.shape[0]
    group = layer.query.shape[1] // heads
    norm = np.zeros((heads, n))
    for h in range(heads):
        for t in range(n):
            projected = [layer.value[h, t] @ layer.output[h * group + g] for g in range(group)]
            norm[h, t] = sum(np.linalg.norm(p, order) for p in projected) / group
    return norm


def largest_around(row: np.ndarray, kernel: int) -> np.ndarray:
    reach = kernel // 2
    return np.array([max(row[max(t - reach, 0) : t + reach + 1]) for t in range(len(row))])


def projected(layer: Layer, h: int, g: int, value: np.ndarray) -> np.ndarray:
    """What a query head makes of a value; the value, where there is no projection."""
    group = layer.query.shape[1] // layer.key.shape[0]
    return value if layer.output is None else value @ layer.output[h * group + g]

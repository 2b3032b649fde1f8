"""Learned scores for models of random weights, and what they foretell, in float64 loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.reference_model import ReferenceLlama
from vllm_defensive.learned import VERSION, Facts, LearnedScore, fingerprint

SINKS = 4


def random_weights(layers: int, heads: int, size: int, seed: int = 0) -> torch.Tensor:
    """fp32 [L, H, 2*D + 1]: nobody has learned them, but tokens differ under them."""
    weight_LHX = torch.randn(layers, heads, 2 * size + 1, generator=torch.Generator().manual_seed(seed)) * size**-0.5
    weight_LHX[..., -1] -= 3
    return weight_LHX


def random_score(model: Path, path: Path, layers: int, heads: int, size: int, seed: int = 0) -> LearnedScore:
    """A score for this model, written to `path`."""
    facts = Facts(
        version=VERSION,
        fingerprint=fingerprint(str(model)),
        model=model.name,
        turned=[True] * layers,
        texts=["none"],
        tokens=1,
        r2=[0.5] * layers,
    )
    score = LearnedScore(facts=facts, weight_LHX=random_weights(layers, heads, size, seed))
    score.save(path)
    return score


def score_of(reference: ReferenceLlama, model: Path, path: Path, seed: int = 0) -> LearnedScore:
    """The same, for the model that `reference` computes."""
    return random_score(model, path, reference.layers, reference.heads, reference.head_size, seed)


def peaks(key: np.ndarray, value: np.ndarray, weight: np.ndarray, theta: float) -> np.ndarray:
    """float64 [H, T] of a model with plain RoPE. key, value: `[H, T, D]`. weight: `[H, 2*D + 1]`."""
    heads, tokens, size = key.shape
    found = np.ones((heads, tokens))
    for head in range(heads):
        for position in range(SINKS, tokens):
            before = np.zeros(size)
            for pair in range(size // 2):
                # Angles are rounded to float32, as where the model is served.
                frequency = np.float32(1.0) / np.float32(theta) ** np.float32(2 * pair / size)
                angle = float(np.float32(position) * np.float32(frequency))
                a, b = key[head, position, pair], key[head, position, pair + size // 2]
                before[pair] = a * np.cos(angle) + b * np.sin(angle)
                before[pair + size // 2] = b * np.cos(angle) - a * np.sin(angle)
            row = np.concatenate([before, value[head, position], [1.0]])
            found[head, position] = min(np.exp(row @ weight[head]), 1.0)
    return found

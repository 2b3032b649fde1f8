"""What is learned from sums is what least squares learn from the tokens themselves; what is foretold is the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.learned_scores import peaks
from vllm_defensive.learned import VERSION, Facts, LearnedScore
from vllm_defensive.worker.learned import FLOOR, RIDGE, LearnedWeights, Lessons, foretold_share, solve
from vllm_defensive_kernels.learned import SINKS, Rotation, foretold_peaks

L, H, D, THETA = 2, 3, 8, 10_000.0


def table(positions: int, theta: float = THETA) -> torch.Tensor:
    frequency = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def text(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values, and peaks that follow from them in part."""
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(L, H, tokens, D, generator=generator) for _ in "kv")
    noise = torch.randn(L, H, tokens, generator=generator)
    return key, value, (value[..., 0] - 3 + 0.5 * noise).exp().clamp_max(1)


@pytest.fixture
def lessons() -> Lessons:
    learned = Lessons(L, H, D, [Rotation(table(90, 50.0)), None])
    for seed, tokens in enumerate((50, 80, 64, 90)):
        learned.held_back = seed == 3
        key, value, peak = text(tokens, seed)
        for layer in range(L):
            learned.add(layer, key[layer], value[layer], peak[layer])
    return learned


def test_sums_yield_the_ridge_regression_of_the_tokens(lessons: Lessons) -> None:
    weight_LHX, r2_LH = lessons.solve()
    parts = [text(tokens, seed) for seed, tokens in enumerate((50, 80, 64))]
    held = text(90, 3)
    assert lessons.tokens == 50 + 80 + 64 - 3 * SINKS
    for layer in range(L):
        for head in range(H):
            rows, target = rows_of(parts, layer, head)
            mean, spread = rows.mean(0), rows.std(0)
            z = (rows - mean) / spread
            w = np.linalg.solve(z.T @ z / len(z) + RIDGE * np.eye(2 * D), z.T @ (target - target.mean()) / len(z))
            expected = np.append(w / spread, target.mean() - (w / spread) @ mean)
            np.testing.assert_allclose(weight_LHX[layer, head].numpy(), expected, rtol=2e-4, atol=1e-5)
            rows, target = rows_of([held], layer, head)
            error = target - rows @ expected[:-1] - expected[-1]
            assert r2_LH[layer, head].item() == pytest.approx(1 - (error**2).mean() / target.var(), abs=1e-4)
    assert 0.4 < r2_LH.min() < r2_LH.max() < 1, "something can be foretold, and not all"


def rows_of(parts: list, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    keys, values, targets = ([part[i][layer, head, SINKS:] for part in parts] for i in range(3))
    if layer == 0:
        keys = [turned_back(key_TD) for key_TD in keys]
    rows = torch.cat([torch.cat(keys), torch.cat(values)], dim=1).double().numpy()
    return rows, torch.cat(targets).clamp_min(FLOOR).log().double().numpy()


def turned_back(key_TD: torch.Tensor) -> torch.Tensor:
    """Pair by pair, as complex numbers, of keys from position SINKS on."""
    pairs_TC = torch.complex(key_TD[:, : D // 2].double(), key_TD[:, D // 2 :].double())
    angle_TC = torch.arange(SINKS, SINKS + len(key_TD))[:, None] / 50.0 ** (torch.arange(0, D, 2) / D)
    back_TC = pairs_TC * torch.polar(torch.ones_like(angle_TC, dtype=torch.float64), -angle_TC.double())
    return torch.cat([back_TC.real, back_TC.imag], dim=1).float()


def test_a_feature_that_never_changes_has_no_weight_and_harms_nobody() -> None:
    rows = torch.randn(500, 4, dtype=torch.float64)
    rows[:, 1] = 3.0
    target = 2 * rows[:, :1] - 1
    with_target = torch.cat([rows, torch.ones(500, 1), target], dim=1)
    gram = with_target.T @ with_target
    weight = solve(gram)
    assert abs(weight[1]) < 1e-3 and weight[0].item() == pytest.approx(2, rel=0.01)
    assert foretold_share(gram, weight).item() == pytest.approx(1, abs=1e-3)


def test_what_is_foretold_is_the_formula_for_each_layer_and_its_own_heads() -> None:
    key, value, _ = text(40, 0)
    generator = torch.Generator().manual_seed(1)
    weight_LHX = torch.randn(L, 2 * H, 2 * D + 1, generator=generator)
    weight_LHX[..., -1] -= 2
    facts = Facts(version=VERSION, fingerprint=None, model="m", turned=[True] * L, texts=[], tokens=1, r2=[])
    score = LearnedScore(facts=facts, weight_LHX=weight_LHX)
    second = LearnedWeights(score, [Rotation(table(40))] * L, slice(H, 2 * H), "cpu")
    for layer in range(L):
        found = second.peaks(layer, key[layer], value[layer])
        arrays = (x.double().numpy() for x in (key[layer], value[layer], weight_LHX[layer, H:]))
        np.testing.assert_allclose(found.numpy(), peaks(*arrays, THETA), rtol=2e-5)
        behind = second.peaks(layer, key[layer][:, 16:], value[layer][:, 16:], first=16)
        torch.testing.assert_close(behind, found[:, 16:])
        without = second.peaks(layer, key[layer], value[layer][:, 16:])
        assert torch.equal(without[:, 16:], found[:, 16:]) and not without[:, :16].any()


def test_a_packed_token_scores_as_it_did_in_its_place() -> None:
    """Heads keep different tokens; what tells them apart is their positions."""
    key, value, _ = text(60, 2)
    weight_HX = torch.randn(H, 2 * D + 1, generator=torch.Generator().manual_seed(3)) - 0.5
    rotation = Rotation(table(60))
    whole = foretold_peaks(key[0], value[0], torch.arange(60), weight_HX, rotation)
    kept_HT = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(h))[:20] for h in range(H)])
    head_H1 = torch.arange(H)[:, None]
    packed = foretold_peaks(key[0][head_H1, kept_HT], value[0][head_H1, kept_HT], kept_HT, weight_HX, rotation)
    torch.testing.assert_close(packed, whole.gather(1, kept_HT), rtol=1e-6, atol=0)

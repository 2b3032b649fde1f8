"""What a learned score foretells of a request's tokens, and the sums from which one is learned, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_defensive.learned import LearnedScore
from vllm_defensive.policy import LayerScores
from vllm_defensive_kernels.learned import SINKS, Rotation, foretold_peaks, unrotate

FLOOR = 1e-6
"""Attention below this is as good as none; without a floor, logarithms of nothing would be what is learned."""
RIDGE = 0.003
"""Of the standardised features, a token."""
NO_SPREAD = 1e-4
"""A feature that varies by less of its size is taken as constant: what is left of its variance is rounding."""


class LearnedWeights:
    """One rank's share of a learned score: the weights of its heads, and how each layer turns its keys."""

    def __init__(
        self, score: LearnedScore, rotations: Sequence[Rotation | None], heads: slice, device: torch.device | str
    ) -> None:
        self.weight_LHX = score.weight_LHX[:, heads].to(device).contiguous()
        self.rotations, self.balance = rotations, score.facts.balance

    def peaks(self, layer: int, key_HTD: Tensor, value_HTD: Tensor, first: int = 0) -> Tensor:
        """What a second look would see, on the window's scale: fp32 `[H, T]`, of T tokens of a request, the first of
        them at position `first`. The values of the first of them may be missing: such tokens have zero."""
        tokens, there = key_HTD.shape[1], value_HTD.shape[1]
        position_T = torch.arange(first + tokens - there, first + tokens, device=key_HTD.device)
        found_HT = foretold_peaks(
            key_HTD[:, tokens - there :], value_HTD, position_T, self.weight_LHX[layer], self.rotations[layer]
        )
        return torch.nn.functional.pad(found_HT.mul_(self.balance), (tokens - there, 0))


class Lessons:
    """Sums over tokens from which a learned score is solved: nothing is kept of a token itself.

    The features of a token are its key before RoPE, its value, and 1; what they are to foretell is the logarithm of the
    largest attention that a repetition of its text pays it. One Gram matrix a head holds the products of all of these:
    features, then the target. Texts come in two kinds, those that are learned from and those that are held back.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_size: int, rotations: Sequence[Rotation | None]
    ) -> None:
        shape = (num_layers, num_kv_heads, 2 * head_size + 2, 2 * head_size + 2)
        self._rotations = rotations
        self.gram_LHYY = torch.zeros(shape, dtype=torch.float64)
        self.held_LHYY = torch.zeros_like(self.gram_LHYY)
        self.held_back = False
        """Whether what comes now is held back."""
        self._ratios: list[Tensor] = []

    def add(self, layer: int, key_HTD: Tensor, value_HTD: Tensor, peak_HT: Tensor) -> None:
        """The tokens of a whole text, from its first on."""
        position_T = torch.arange(key_HTD.shape[1], device=key_HTD.device)
        key_HTD = unrotate(key_HTD, position_T, self._rotations[layer])
        one_HT1 = torch.ones_like(key_HTD[..., :1])
        target_HT1 = peak_HT.clamp_min(FLOOR).log().unsqueeze(-1)
        # In fp64: keys with a bias are far from zero, beside how much they vary.
        row_HTY = torch.cat([key_HTD, value_HTD.float(), one_HT1, target_HT1], dim=-1)[:, SINKS:].double()
        sums = self.held_LHYY if self.held_back else self.gram_LHYY
        sums[layer] += (row_HTY.mT @ row_HTY).cpu()

    def compare(self, window: Sequence[LayerScores], foretold: Sequence[LayerScores]) -> None:
        """What both say of one text, all layers."""
        ends = [best_quarter(torch.cat([scores.scores_HE.flatten() for scores in some])) for some in (window, foretold)]
        self._ratios.append((ends[0] / ends[1]).cpu())

    @property
    def balance(self) -> float:
        """What brings foretold scores onto the window's scale: the geometric mean over the texts compared so far of the
        ratio of what the best quarter of all tokens and heads has at least. 1 without any.

        Foretold attention is that of queries which look for the very token: nearly everywhere larger than the window's,
        so that the larger of the two, as they are, would hardly ever be the window's.
        """
        ratios = [ratio for ratio in self._ratios if ratio.isfinite() and ratio > 0]
        return float(torch.stack(ratios).log().mean().exp()) if ratios else 1.0

    def save(self, path: str) -> None:
        """Write the sums so far into a safetensors file. Raises OSError, or SafetensorError."""
        save_file({"gram_LHYY": self.gram_LHYY, "held_LHYY": self.held_LHYY}, path)

    def load(self, path: str) -> None:
        """Go on from sums that `save` wrote. Raises what safetensors does, and RuntimeError for other shapes."""
        sums = load_file(path)
        self.gram_LHYY.copy_(sums["gram_LHYY"])
        self.held_LHYY.copy_(sums["held_LHYY"])

    @property
    def tokens(self) -> int:
        """Learned from so far."""
        return round(float(self.gram_LHYY[0, 0, -2, -2]))

    def solve(self) -> tuple[Tensor, Tensor]:
        """(weight_LHX, fp32; share of the target's variance that it foretells on the texts held back, `[L, H]`)."""
        weight_LHX = solve(self.gram_LHYY)
        return weight_LHX.float(), foretold_share(self.held_LHYY, weight_LHX)


def best_quarter(score_X: Tensor) -> Tensor:
    """The least of the best quarter of all that are finite."""
    score_X = score_X[score_X.isfinite()]
    return score_X.topk(max(1, len(score_X) // 4)).values[-1]


def solve(gram_LHYY: Tensor) -> Tensor:
    """Ridge regression on standardised features, in closed form. fp64 `[..., Y, Y]` -> `[..., X]`, the constant last.

    (Z'Z / n + RIDGE) w = Z'y / n, for features less their mean, over their standard deviation.
    """
    count = gram_LHYY[..., -2, -2, None]
    mean_LHF = gram_LHYY[..., :-2, -2] / count
    target_mean = gram_LHYY[..., -1, -2, None] / count
    covariance = gram_LHYY[..., :-2, :-2] / count[..., None] - mean_LHF[..., :, None] * mean_LHF[..., None, :]
    size_LHF = (gram_LHYY.diagonal(dim1=-2, dim2=-1)[..., :-2] / count).sqrt()
    spread_LHF = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    spread_LHF = torch.maximum(spread_LHF, NO_SPREAD * size_LHF).clamp_min(FLOOR)
    correlation = covariance / (spread_LHF[..., :, None] * spread_LHF[..., None, :])
    correlation.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    with_target = (gram_LHYY[..., :-2, -1] / count - mean_LHF * target_mean) / spread_LHF
    weight_LHF = torch.linalg.solve(correlation, with_target) / spread_LHF
    constant = target_mean - (weight_LHF * mean_LHF).sum(dim=-1, keepdim=True)
    return torch.cat([weight_LHF, constant], dim=-1)


def foretold_share(gram_LHYY: Tensor, weight_LHX: Tensor) -> Tensor:
    """1 - residual / variance, of the texts that these sums are of. fp32 `[...]`"""
    error_LHY = torch.cat([weight_LHX, -torch.ones_like(weight_LHX[..., :1])], dim=-1)
    residual = torch.einsum("...y,...yz,...z->...", error_LHY, gram_LHYY, error_LHY)
    variance = gram_LHYY[..., -1, -1] - gram_LHYY[..., -1, -2].square() / gram_LHYY[..., -2, -2]
    return (1 - residual / variance.clamp_min(FLOOR)).float()

"""The sums of whole layers are those of heads that see one another."""

from __future__ import annotations

import torch

from benchmarks.learned import BothLessons, mean_r2, of_layers
from vllm_defensive.worker.learned import solve

L, H, D, T = 2, 3, 4, 300


def test_a_layers_sums_hold_each_heads_own_and_foretell_no_less() -> None:
    generator = torch.Generator().manual_seed(0)
    lessons = BothLessons(L, H, D, [None] * L)
    for _ in range(2):
        key, value = (torch.randn(L, H, T, D, generator=generator) for _ in "kv")
        # What a head pays follows from its own value, and from the next head's, which only the layer knows.
        log = value[..., 0] + value.roll(-1, dims=1)[..., 0] - 4
        for layer in range(L):
            lessons.add(layer, key[layer], value[layer], log[layer].exp().clamp_max(1))
    whole = of_layers([lessons.layers], H)
    own = lessons.gram_LHYY
    features = torch.arange(2 * D)
    for head in range(H):
        at = torch.cat([head * 2 * D + features, torch.tensor([-2, -1]) + whole.shape[-1]])
        torch.testing.assert_close(whole[:, head][:, at][:, :, at], own[:, head], rtol=1e-9, atol=1e-6)
    assert mean_r2(own, solve(own)) < 0.7 < 0.9 < mean_r2(whole, solve(whole))

"""Every policy keeps exactly what a float64 loop over the plain formulas keeps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.policy import naive
from tests.policy.cases import (
    SHAPES,
    Shape,
    kept_by_head,
    make_layers,
    naive_layer,
    scale_of,
    score,
    select_tokens,
)
from vllm_defensive.policy import PRESETS, Policy

VARIANTS = {
    **{name: policy for name, policy in PRESETS.items() if name != "random"},
    "defensivekv-true-bias": replace(PRESETS["defensivekv"], window_bias="true"),
    "defensivekv-no-pool": replace(PRESETS["defensivekv"], pool_kernel=1),
    "layer-defensivekv-gram": replace(PRESETS["layer-defensivekv"], value_weight="l2-gram"),
    "layer-defensivekv-no-norm": replace(PRESETS["layer-defensivekv"], value_weight="none"),
    "criticalkv-gram-kernel-3": replace(PRESETS["criticalkv"], value_weight="l2-gram", pool_kernel=3),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def policy(request: pytest.FixtureRequest) -> Policy:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_the_formula(policy: Policy, shape: Shape) -> None:
    n = shape.tokens - shape.window
    for i, inputs in enumerate(make_layers(shape)):
        ours = score(policy, shape, inputs, layer=i)
        expected, rank = naive.scores(policy, naive_layer(inputs), index=i, scale=scale_of(shape), keep_ratio=0.4)
        # 1e-5: a few hundred float32 roundings (6e-8 each) of a softmax, a sum and a norm.
        np.testing.assert_allclose(ours.scores_HE[:, :n], expected, rtol=1e-5)
        assert ours.scores_HE[:, n:].isinf().all(), "the window must stay"
        assert (ours.rank_HE is None) == (rank is None)
        if rank is not None:
            np.testing.assert_allclose(ours.rank_HE[:, :n], rank, rtol=1e-5)
            assert ours.rank_HE[:, n:].isinf().all()


@pytest.mark.parametrize("keep_ratio", [0.35, 0.8])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.window <= 0.35 * s.tokens], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_kept_tokens_are_the_same(policy: Policy, shape: Shape, keep_ratio: float, seed: int) -> None:
    layers = make_layers(shape, seed, spread=3.0)
    ours = select_tokens(
        policy,
        shape,
        [score(policy, shape, x, layer=i, keep_ratio=keep_ratio) for i, x in enumerate(layers)],
        keep_ratio,
    )
    expected = naive.kept_sets(
        policy,
        [
            naive.scores(policy, naive_layer(x), index=i, scale=scale_of(shape), keep_ratio=keep_ratio)
            for i, x in enumerate(layers)
        ],
        tokens=shape.tokens,
        window=shape.window,
        keep_ratio=keep_ratio,
    )
    assert kept_by_head(ours) == {at: sorted(tokens) for at, tokens in expected.items()}


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_bf16_inputs_give_float32_scores(shape: Shape) -> None:
    inputs = make_layers(shape, dtype=torch.bfloat16)[0]
    policy = PRESETS["adakv"]
    ours = score(policy, shape, inputs).scores_HE
    expected, _ = naive.scores(policy, naive_layer(inputs), index=0, scale=scale_of(shape), keep_ratio=0.4)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours[:, : -shape.window], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["criticalkv", "layer-defensivekv"])
def test_bf16_value_norms_are_within_bf16_of_the_formula(name: str) -> None:
    shape = Shape(300, heads=3, group=3, head_size=64, hidden=576)
    inputs = make_layers(shape, dtype=torch.bfloat16)[0]
    ours = score(PRESETS[name], shape, inputs)
    ours_HE = ours.scores_HE if ours.rank_HE is None else ours.rank_HE
    scores, rank = naive.scores(PRESETS[name], naive_layer(inputs), index=0, scale=scale_of(shape), keep_ratio=0.4)
    # 2**-8: the sum of a row's magnitudes is rounded to bf16 once, and so is the denominator's share of it.
    np.testing.assert_allclose(ours_HE[:, : -shape.window], scores if rank is None else rank, rtol=2**-8)

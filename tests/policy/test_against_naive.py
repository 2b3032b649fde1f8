"""Every policy keeps exactly what a float64 loop over the plain formulas keeps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.policy import naive
from tests.policy.cases import (
    SHAPES,
    Shape,
    echoed,
    kept_by_head,
    make_layers,
    naive_layer,
    scale_of,
    score,
    select_tokens,
)
from tests.policy.naive_formulas import local_heads
from vllm_defensive.policy import PRESETS, LayerScores, Policy

VARIANTS = {
    **{name: policy for name, policy in PRESETS.items() if name not in ("random-uneven", "kvzip", "rdkv")},
    "rdkv-window": replace(PRESETS["rdkv"], keeps_window=True, widths="16"),
    "kvzip-window": replace(PRESETS["kvzip"], keeps_window=True),
    "kvzip-gram": replace(PRESETS["kvzip"], keeps_window=True, value_weight="l2-gram"),
    "defensivekv-true-bias": replace(PRESETS["defensivekv"], window_bias="true"),
    "defensivekv-no-pool": replace(PRESETS["defensivekv"], pool_kernel=1),
    "defensivekv-halo": replace(PRESETS["defensivekv"], pool_kernel=1, halo_tokens=3, halo_weight=0.3),
    "defensivekv-no-stage-1": replace(PRESETS["defensivekv"], stages="none"),
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
        # 1e-7: one rounding of a cosine, whose terms cancel near zero; most other scores are sums of positive terms.
        cosine = policy.aggregate in ("key-difference", "redundancy")
        np.testing.assert_allclose(ours.scores_HE[:, :n], expected, rtol=1e-5, atol=1e-7 if cosine else 0)
        assert ours.scores_HE[:, n:].isinf().all(), "the window must stay"
        assert (ours.rank_HE is None) == (rank is None)
        if rank is not None:
            np.testing.assert_allclose(ours.rank_HE[:, :n], rank, rtol=1e-5)
            assert ours.rank_HE[:, n:].isinf().all()


@pytest.mark.parametrize(("cap", "void"), [(0.5, None), (0.0, 5.0), (1.0, 3.0)], ids=["cap", "void", "both"])
def test_caps_and_voids_are_in_every_formula(policy: Policy, cap: float, void: float | None) -> None:
    """Large enough that most of the attention goes to nothing, or that the highest logits are quartered."""
    shape = Shape(97, heads=2, group=2, window=5)
    n, inputs = shape.tokens - shape.window, make_layers(shape)[0]
    void_Q = None if void is None else void + torch.linspace(-1, 1, shape.heads * shape.group)
    layer = replace(naive_layer(inputs), cap=cap, void=None if void_Q is None else void_Q.double().numpy())
    ours = score(policy, shape, inputs, cap=cap, void_Q=void_Q)
    expected, rank = naive.scores(policy, layer, index=0, scale=scale_of(shape), keep_ratio=0.4)
    cosine = policy.aggregate in ("key-difference", "redundancy")
    np.testing.assert_allclose(ours.scores_HE[:, :n], expected, rtol=2e-5, atol=1e-7 if cosine else 0)
    if rank is not None:
        np.testing.assert_allclose(ours.rank_HE[:, :n], rank, rtol=2e-5)


def test_caps_and_voids_change_scores() -> None:
    """Else the test above could not fail. Scores of a window's mean are attention itself."""
    inputs = make_layers(SHAPES[3])[0]
    plain = score(PRESETS["snapkv"], SHAPES[3], inputs).scores_HE
    for options in ({"cap": 0.5}, {"void_Q": torch.full((4,), 5.0)}):
        other = score(PRESETS["snapkv"], SHAPES[3], inputs, **options).scores_HE
        finite = plain.isfinite()
        assert ((other - plain)[finite].abs() / plain[finite]).max() > 0.2


@pytest.mark.parametrize("keep_ratio", [0.35, 0.8])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.window <= 0.35 * s.tokens], ids=str)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kept_tokens_are_the_same(policy: Policy, shape: Shape, keep_ratio: float, seed: int) -> None:
    layers = make_layers(shape, seed, spread=3.0)
    ours = select_tokens(
        policy,
        shape,
        [score(policy, shape, x, layer=i, keep_ratio=keep_ratio) for i, x in enumerate(layers)],
        keep_ratio,
    )
    scores = [
        naive.scores(policy, naive_layer(x), index=i, scale=scale_of(shape), keep_ratio=keep_ratio)
        for i, x in enumerate(layers)
    ]
    expected = naive.kept_sets(
        policy,
        scores,
        tokens=shape.tokens,
        window=shape.window,
        keep_ratio=keep_ratio,
        weights=[naive.layer_weight(policy, naive_layer(x), scale_of(shape)) for x in layers],
        local=[local_heads(naive_layer(x), scale_of(shape)) for x in layers],
    )
    found = kept_by_head(ours)
    assert found.keys() == expected.keys()
    # Where two scores are as good as equal, rounding chooses: fp32 here, and other instructions on other machines.
    apart = [(at, token) for at in expected for token in set(found[at]) ^ set(expected[at])]
    values = [scores[layer][0][head][token] for (layer, head), token in apart]
    assert len(apart) <= 2 and (not apart or max(values) - min(values) <= 2e-5 * max(values))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kvzip_scores_the_window_like_all_else(shape: Shape) -> None:
    for i, inputs in enumerate(make_layers(shape)):
        ours = score(PRESETS["kvzip"], shape, inputs, layer=i)
        assert torch.equal(ours.scores_HE, echoed(inputs.key_HSD))


@pytest.mark.parametrize("name", ["adakv", "criticalkv"])
@pytest.mark.parametrize("seed", range(4))
def test_a_starved_head_keeps_its_guard(name: str, seed: int) -> None:
    """Heads whose scores lie factors of 100 apart: without the guard the last ones would keep their window only."""
    shape = Shape(120, heads=3, window=4, layers=2)
    n = shape.tokens - shape.window
    rng = np.random.default_rng(seed)
    weak = np.array([1.0, 0.01, 0.0001])[:, None]
    plain = (rng.random((2, shape.heads, n)) * weak).astype(np.float32)
    ranks = rng.random((2, shape.heads, n)).astype(np.float32) if name == "criticalkv" else [None, None]
    window = torch.full((shape.heads, shape.window), float("inf"))

    def forced(scores_HT: np.ndarray | None) -> torch.Tensor | None:
        return None if scores_HT is None else torch.cat([torch.from_numpy(scores_HT), window], dim=1)

    scores = [LayerScores(forced(plain[i]), forced(ranks[i])) for i in range(2)]
    ours = kept_by_head(select_tokens(PRESETS[name], shape, scores, 0.3))
    expected = naive.kept_sets(
        PRESETS[name], list(zip(plain, ranks, strict=True)), tokens=shape.tokens, window=shape.window, keep_ratio=0.3
    )
    assert ours == {at: sorted(tokens) for at, tokens in expected.items()}
    assert len(ours[0, 2]) == int(0.2 * int(120 * 0.3))


@pytest.mark.parametrize(
    "policy",
    [VARIANTS[name] for name in ("snapkv", "defensivekv-true-bias", "laprox", "tova", "lava", "headkv", "deletion")],
    ids=lambda policy: policy.aggregate,
)
@pytest.mark.parametrize("elements", [1, 2 * 16 * 131 // 4])
def test_scores_do_not_depend_on_how_many_heads_are_held_at_a_time(
    policy: Policy, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query head, and two of a group of seven, against all at once."""
    shape = SHAPES[2]
    inputs = make_layers(shape)[0]
    whole = score(policy, shape, inputs).scores_HE
    monkeypatch.setattr("vllm_defensive_kernels.formulas.CACHE_ELEMENTS", elements)
    torch.testing.assert_close(score(policy, shape, inputs).scores_HE, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("name", ["adakv", "lava", "dropkv", "obcache", "capkv-window", "expected-window"])
def test_bf16_inputs_give_float32_scores(shape: Shape, name: str) -> None:
    inputs = make_layers(shape, dtype=torch.bfloat16)[0]
    policy = PRESETS[name]
    ours = score(policy, shape, inputs).scores_HE
    expected, _ = naive.scores(policy, naive_layer(inputs), index=0, scale=scale_of(shape), keep_ratio=0.4)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours[:, : -shape.window], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["criticalkv", "layer-defensivekv", "laprox"])
def test_bf16_value_norms_are_within_bf16_of_the_formula(name: str) -> None:
    shape = Shape(300, heads=3, group=3, head_size=64, hidden=576)
    inputs = make_layers(shape, dtype=torch.bfloat16)[0]
    ours = score(PRESETS[name], shape, inputs)
    ours_HE = ours.scores_HE if ours.rank_HE is None else ours.rank_HE
    scores, rank = naive.scores(PRESETS[name], naive_layer(inputs), index=0, scale=scale_of(shape), keep_ratio=0.4)
    # 2**-8: the sum of a row's magnitudes is rounded to bf16 once, and so is the denominator's share of it.
    np.testing.assert_allclose(ours_HE[:, : -shape.window], scores if rank is None else rank, rtol=2**-8)

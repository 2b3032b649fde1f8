"""What must not change a policy's choice, and what its algebra promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.policy import naive
from tests.policy.cases import (
    LayerInputs,
    Shape,
    kept_by_head,
    make_layers,
    naive_layer,
    scale_of,
    score,
    select_tokens,
)
from vllm_defensive.policy import PRESETS, LayerScores, select
from vllm_defensive.policy.scores import keys

SHAPE = Shape(160, heads=3, group=2, window=16, layers=2)
N = SHAPE.tokens - SHAPE.window


def kept(name: str, layers: list[LayerInputs], **changes: object) -> dict[tuple[int, int], list[int]]:
    policy = replace(PRESETS[name], **changes)
    scores = [score(policy, SHAPE, inputs, layer=i) for i, inputs in enumerate(layers)]
    return kept_by_head(select_tokens(policy, SHAPE, scores, 0.4))


def test_a_layer_with_a_larger_projection_does_not_take_the_others_budget() -> None:
    """LaProx: its scores sum to 1 in every layer. Without that the layer would win pages."""
    layers = make_layers(SHAPE)
    louder = [layers[0], replace(layers[1], output_QDM=10 * layers[1].output_QDM)]
    assert kept("laprox", louder) == kept("laprox", layers)
    assert kept("laprox", louder, normalise="none") != kept("laprox", layers, normalise="none")
    for inputs in layers:
        assert abs(score(PRESETS["laprox"], SHAPE, inputs).scores_HE[:, :N].sum() - 1) < 1e-6


def peaked(gap: float) -> LayerInputs:
    """A layer whose queries all pay the same token, number 40, e^gap times what the others get at most."""
    inputs = make_layers(SHAPE)[0]
    query_WQD = torch.ones_like(inputs.query_WQD)
    key_HSD = 0.01 * inputs.key_HSD
    key_HSD[:, 40] = gap / (SHAPE.head_size * scale_of(SHAPE))
    return replace(inputs, query_WQD=query_WQD, key_HSD=key_HSD)


@pytest.mark.parametrize("name", ["deletion", "dropkv", "obcache"])
@pytest.mark.parametrize("gap", [3.0, 12.0, 25.8])  # the last: attention of 1 - 1e-9
def test_a_token_that_has_nearly_all_attention_is_weighed_exactly(name: str, gap: float) -> None:
    inputs, policy = peaked(gap), replace(PRESETS[name], pool_kernel=1)
    ours = score(policy, SHAPE, inputs).scores_HE[:, :N]
    expected, _ = naive.scores(policy, naive_layer(inputs), index=0, scale=scale_of(SHAPE), keep_ratio=0.4)
    # 1e-5 as everywhere, and 1e-5 of the exponent: logits of 25 are rounded by 1e-6.
    np.testing.assert_allclose(ours[:, 40], expected[:, 40], rtol=1e-4)
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", ["deletion", "dropkv", "obcache"])
def test_a_token_that_has_all_attention_there_is_gives_a_number(name: str) -> None:
    """The others' underflows, and so does 1 - A."""
    ours = score(PRESETS[name], SHAPE, peaked(300.0)).scores_HE[:, :N]
    assert ours.isfinite().all()
    assert name != "deletion" or (ours.argmax(dim=1) == 40).all(), "the output would be another altogether"


@pytest.mark.parametrize("name", ["deletion", "dropkv", "obcache"])
@pytest.mark.parametrize("token", [7, 40], ids=["one of many", "the largest of its row"])
def test_a_token_whose_value_is_the_output_can_go(name: str, token: int) -> None:
    shape = Shape(60, heads=1, group=1, window=1, layers=1)
    inputs = make_layers(shape)[0]
    rows = torch.from_numpy(naive.attention(naive_layer(inputs), scale_of(shape)))[0, 0, 0]
    value_SD = inputs.value_HSD[0].double()
    if token == 40:
        inputs.key_HSD[0, 40] = inputs.query_WQD[0, 0]
        rows = torch.from_numpy(naive.attention(naive_layer(inputs), scale_of(shape)))[0, 0, 0]
        assert rows.argmax() == 40
    value_SD[token] = (rows @ value_SD - rows[token] * value_SD[token]) / (1 - rows[token])
    inputs = replace(inputs, value_HSD=value_SD.float()[None])
    policy = replace(PRESETS[name], pool_kernel=1)
    ours = score(policy, shape, inputs).scores_HE[0, :-1]
    # 1e-3 of a distance: its square is off by a few roundings of the values' squares.
    share = ours[token] / rows[token].float() ** (1 if name == "deletion" else 2)
    assert share <= (1e-3 if name == "deletion" else 1e-4) * inputs.value_HSD.square().sum(dim=-1).max()
    assert ours.argmin() == token or ours[token] < 1e-3 * ours.max()


def leverages(key_HSD: Tensor, value_HSD: Tensor, mean_QD: Tensor, tau: float = 5.0) -> tuple[Tensor, Tensor]:
    """(weights, scores) of one head, float64 and float32."""
    cosine_S = torch.nn.functional.cosine_similarity(key_HSD[0].double(), mean_QD.double(), dim=-1)
    return torch.exp(tau * (cosine_S - cosine_S.max())), keys.capacity(key_HSD, value_HSD, mean_QD, tau)[0]


def test_leverages_add_up_to_the_dimensions_that_are_taken() -> None:
    """CapKV: sum_t (w_t + 1e-6) v^T Z^-1 v = D - trace(Z^-1)."""
    generator = torch.Generator().manual_seed(0)
    key, value, mean = (torch.randn(*size, generator=generator) for size in ((1, 50, 8), (1, 50, 8), (1, 8)))
    weight, ours = leverages(key, value, mean)
    gram = torch.eye(8, dtype=torch.float64) + (value[0].double().mT * (weight + 1e-6)) @ value[0].double()
    taken = (ours / weight * (weight + 1e-6)).sum()
    torch.testing.assert_close(taken, 8 - gram.inverse().trace(), rtol=1e-5, atol=0)
    assert keys.capacity(key, value, mean, 50.0).isfinite().all(), "however sharp"


def test_leverage_of_twins_and_of_a_value_like_no_other() -> None:
    generator = torch.Generator().manual_seed(1)
    key, value, mean = (torch.randn(*size, generator=generator) for size in ((1, 30, 8), (1, 30, 8), (1, 8)))
    key[:, 1], value[:, 1] = key[:, 0], value[:, 0]
    value[..., 7] = 0
    value[0, 5] = 3 * torch.eye(8)[7]
    weight, ours = leverages(key, value, mean)
    torch.testing.assert_close(ours[0], ours[1])
    alone = weight[5] * 9 / (1 + (weight[5] + 1e-6) * 9)
    torch.testing.assert_close(ours[5].double(), alone, rtol=1e-5, atol=0)


def test_expected_attention_is_what_gaussian_queries_pay_on_average() -> None:
    """Expectations of exp(logit) by a hundred thousand draws, normalised over the tokens."""
    generator = torch.Generator().manual_seed(2)
    root, mean, key = (torch.randn(*size, generator=generator) for size in ((6, 6), (6,), (9, 6)))
    drawn = mean + torch.randn(100_000, 6, generator=generator) @ root.mT
    paid = torch.exp(drawn.double() @ key.double().mT * 0.2).mean(dim=0)
    ours = keys.expected(key[None], mean[None], (root @ root.mT)[None], 0.2)[0]
    # Five standard errors of such a mean, whose terms vary by as much as they are large.
    torch.testing.assert_close(ours.double(), paid / paid.sum(), rtol=5 * 3 / 100_000**0.5, atol=0)


def test_how_long_keys_are_does_not_matter_to_where_they_point() -> None:
    inputs = make_layers(SHAPE)[0]
    stretched = replace(inputs, key_HSD=inputs.key_HSD * torch.linspace(0.1, 9, SHAPE.tokens)[:, None])
    ours, other = (score(PRESETS["keydiff"], SHAPE, x).scores_HE for x in (inputs, stretched))
    torch.testing.assert_close(other, ours, rtol=0, atol=1e-6)


def test_the_last_query_alone_decides_for_every_head() -> None:
    inputs = make_layers(SHAPE)[0]
    others = inputs.query_WQD.clone()
    others[:-1] = 7
    ours, same = (score(PRESETS["tova"], SHAPE, replace(inputs, query_WQD=q)) for q in (inputs.query_WQD, others))
    assert torch.equal(ours.scores_HE, same.scores_HE)
    assert (ours.scores_HE == ours.scores_HE[0]).all() and len(ours.scores_HE[0, :N].unique()) > N // 2


def looks_at(shape: Shape, positions: list[slice]) -> LayerInputs:
    """A layer each of whose heads pays the tokens of one slice alike, and hardly any others."""
    inputs = make_layers(shape)[0]
    key_HSD = torch.zeros_like(inputs.key_HSD)
    for head, wanted in enumerate(positions):
        key_HSD[head, wanted] = 10 / (shape.head_size * scale_of(shape))
    return replace(inputs, query_WQD=torch.ones_like(inputs.query_WQD), key_HSD=key_HSD)


def test_heads_that_look_at_the_newest_tokens_are_local() -> None:
    """And so is one that parks half of its attention on the first tokens; one that looks everywhere is not."""
    shape = Shape(400, heads=3, group=2, window=8, layers=1)
    inputs = looks_at(shape, [slice(380, 400), slice(380, 400), slice(0, 400)])
    inputs.key_HSD[1, :4] = inputs.key_HSD[1, 390]
    ours = score(PRESETS["headkv"], shape, inputs)
    assert ours.local_H is not None and ours.local_H.tolist() == [True, True, False]


@pytest.mark.parametrize("budget", [9, 30, 77])
def test_each_half_of_the_prompt_keeps_half(budget: int) -> None:
    ours = score(PRESETS["headkv"], SHAPE, make_layers(SHAPE)[0])
    for row in ours.scores_HE[:, 4:N]:  # without the first tokens, which stay
        best = 4 + row.sort(descending=True, stable=True).indices[:budget]
        assert abs(int((best < N / 2).sum()) - budget / 2) <= 4, "the first tokens' own ranks are missing from theirs"


@pytest.mark.parametrize("local", [0b000000, 0b010110, 0b111110, 0b111111])
@pytest.mark.parametrize("start", [0, 32])
def test_local_heads_keep_the_prompts_ends_and_the_others_share_the_rest(local: int, start: int) -> None:
    types = torch.tensor([bool(local >> i & 1) for i in range(6)]).view(2, 3)
    scores_LHE = torch.rand(2, 3, 80, generator=torch.Generator().manual_seed(0))
    scores_LHE[..., 64:] = float("inf")
    scores = [LayerScores(s, local_H=t) for s, t in zip(scores_LHE, types, strict=True)]
    pages = select(PRESETS["headkv"], scores, page_size=8, packed_blocks=5, evictable=(start, start + 80)).pages_LH
    assert pages.sum() == 5 * 6
    ends = 2 + (start == 0)
    if not types.any() or types.all():
        assert (pages == 5).all()
    else:
        others, room = pages[~types], 30 - ends * int(types.sum())
        even, more = divmod(room, len(others))
        expected = [min(10, even)] * (len(others) - more) + [min(10, even + 1)] * more
        assert sorted(others.tolist()) == expected
        assert (pages[types] >= ends).all()
        assert local == 0b111110 or (pages[types] == ends).all(), "only when the others are full do they get more"


def test_random_keeps_the_ends_and_as_much_of_every_stretch() -> None:
    shape = Shape(4096, heads=4, group=1, head_size=8, window=32, layers=2)
    policy, layers = PRESETS["random"], make_layers(Shape(64, heads=4, group=1, head_size=8, window=32))
    whole = {"key_HSD": torch.zeros(4, 4096, 8), "evictable": (0, 4096)}
    scores = [score(policy, shape, x, layer=i, **whole) for i, x in enumerate(layers)]
    chosen = kept_by_head(select_tokens(policy, shape, scores, 0.25))
    for tokens in chosen.values():
        assert len(tokens) == 1024 and tokens[:4] == [0, 1, 2, 3] and tokens[-32:] == list(range(4064, 4096))
        parts, _ = np.histogram(tokens[4:-32], bins=8, range=(4, 4064))
        assert abs(parts - 123.5).max() < 5 * 10, "five standard deviations of a draw"
    shared = set(chosen[0, 0]) & set(chosen[0, 1])
    assert len(shared) < 1.3 * 1024 * 0.25 + 36, "each head draws its own"


def test_random_draws_the_same_on_any_number_of_ranks() -> None:
    inputs, policy = make_layers(SHAPE)[0], PRESETS["random"]
    whole = score(policy, SHAPE, inputs, layer=3).scores_HE
    last = score(policy, SHAPE, inputs, layer=3, key_HSD=inputs.key_HSD[2:], first_head=2).scores_HE
    assert torch.equal(last, whole[2:]) and not torch.equal(last, whole[:1])


def test_layers_with_evener_scores_get_more_and_a_starved_head_its_share_of_them() -> None:
    """LAVa."""
    shape = Shape(256, heads=2, group=1, window=8, layers=2)
    everywhere, narrow = looks_at(shape, [slice(0, 256)] * 2), looks_at(shape, [slice(100, 110)] * 2)
    everywhere.value_HSD[1] *= 1e-3
    scores = [score(PRESETS["lava"], shape, x) for x in (everywhere, narrow)]
    pages = select(PRESETS["lava"], scores, page_size=8, packed_blocks=8, evictable=(0, 256)).pages_LH
    assert pages.sum() == 32
    budgets = pages.sum(dim=1)
    assert budgets[0] > 1.2 * budgets[1]
    assert pages[0, 1] == int(0.2 * budgets[0] / 2) < pages[0, 0]

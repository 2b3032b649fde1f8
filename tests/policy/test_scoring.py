"""Properties of the scores: the defensive clamp, preserved mass, uneven heads, ranks that share a layer."""

import threading
from dataclasses import replace

import pytest
import torch

from tests.policy.cases import SHAPES, LayerInputs, Shape, kept_by_head, make_layers, scale_of, score, select_tokens
from vllm_defensive.policy import PRESETS, Attention, Policy, select, settle
from vllm_defensive_kernels import formulas

SHAPE = Shape(200, heads=4, group=3, window=16)
PUBLIC = [policy for policy in PRESETS.values() if not policy.internal]


def by_name(policy: Policy) -> str:
    return policy.name


def attention_of(shape: Shape, seed: int = 0) -> torch.Tensor:
    inputs = make_layers(shape, seed)[0]
    rows = formulas.window_attention(inputs.query_WQD, inputs.key_HSD, scale_of(shape))
    return rows[..., : shape.tokens - shape.window]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_window_attention_is_causal_and_sums_to_one(shape: Shape) -> None:
    inputs = make_layers(shape)[0]
    rows = formulas.window_attention(inputs.query_WQD, inputs.key_HSD, scale_of(shape))
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(rows.shape[:-1]))
    future = torch.ones(shape.window, shape.window, dtype=torch.bool).triu(1)
    assert (rows[..., -shape.window :][..., future] == 0).all()


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pooling_preserves_the_mass_of_each_row(shape: Shape, kernel: int) -> None:
    attention = attention_of(shape)
    pooled = formulas.pool_preserving_mass(attention, kernel)
    torch.testing.assert_close(pooled.sum(dim=-1), attention.sum(dim=-1))


def test_pooling_is_torchs_average_pooling() -> None:
    values = torch.rand(2, 3, 41)
    expected = torch.nn.functional.avg_pool1d(values, 5, stride=1, padding=2)
    torch.testing.assert_close(formulas.pool_tokens(values, 5), expected)


def test_a_row_without_mass_before_the_window_stays_zero() -> None:
    assert (formulas.pool_preserving_mass(torch.zeros(1, 2, 9), 5) == 0).all()
    assert not formulas.certain_by_mass(torch.zeros(2, 9), 0.9, 5).any()


@pytest.mark.parametrize("tile", [1, 700, 2**30])
def test_tiles_change_no_bit(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = attention_of(SHAPE)
    expected = formulas.pool_preserving_mass(attention, 5).amax(dim=(1, 2))
    monkeypatch.setattr(formulas, "CACHE_ELEMENTS", tile)
    assert torch.equal(formulas.aggregate_peak(attention, 5), expected)


@pytest.mark.parametrize("seed", range(3))
def test_defensive_scores_bound_the_mean_from_above(seed: int) -> None:
    """The worst case is never below the average, and nobody falls below the mean of the head."""
    attention = attention_of(SHAPE, seed)
    peak = formulas.aggregate_peak(attention, 5)
    risk = formulas.aggregate_defensive(attention, 5)
    mean = formulas.aggregate_mean(formulas.pool_preserving_mass(attention, 5))
    assert (peak >= mean * (1 - 1e-6)).all()
    assert (risk >= peak).all()
    torch.testing.assert_close(risk.amin(dim=-1), peak.mean(dim=-1))


def test_stage_one_leaves_out_the_token_that_crosses_the_threshold() -> None:
    attention = torch.tensor([[0.1, 0.5, 0.1, 0.3]])
    assert formulas.certain_by_mass(attention, 0.85, cap=4).tolist() == [[False, True, False, True]]
    assert formulas.certain_by_mass(attention, 0.75, cap=4).tolist() == [[False, True, False, False]]
    assert formulas.certain_by_mass(attention, 0.95, cap=3).tolist() == [[True, True, False, True]], "lowest tie first"
    assert not formulas.certain_by_mass(attention, -0.1, cap=4).any()
    assert not formulas.certain_by_mass(attention, 0.9, cap=-5).any(), "a negative cap is none, not nearly all"


def test_gram_norm_is_the_l2_norm_of_the_projected_value() -> None:
    inputs = make_layers(Shape(90, heads=2, group=3, head_size=80, hidden=50))[0]
    norm = formulas.value_norm_l2(inputs.value_HSD, formulas.gram_factor(inputs.output_QDM))
    grouped = inputs.output_QDM.view(2, 3, 80, 50)
    expected = torch.einsum("htd,hgdm->hgtm", inputs.value_HSD, grouped).norm(dim=-1).mean(dim=1)
    torch.testing.assert_close(norm, expected)


@pytest.mark.parametrize("policy", PUBLIC, ids=by_name)
def test_scores_do_not_depend_on_the_range_that_may_go(policy: Policy) -> None:
    inputs = make_layers(SHAPE)[0]
    whole = score(policy, SHAPE, inputs)
    part = score(policy, SHAPE, inputs, evictable=(48, 192))
    assert torch.equal(part.scores_HE, whole.scores_HE[:, 48:192])
    if whole.rank_HE is not None:
        assert part.rank_HE is not None and torch.equal(part.rank_HE, whole.rank_HE[:, 48:192])


@pytest.mark.parametrize("policy", [p for p in PUBLIC if not p.needs_all_values], ids=by_name)
@pytest.mark.parametrize("skipped", [1, 48])
@pytest.mark.parametrize("first", [48, 190])
def test_values_of_tokens_that_stay_may_be_missing(policy: Policy, skipped: int, first: int) -> None:
    inputs = make_layers(SHAPE)[0]
    cut = replace(inputs, value_HSD=inputs.value_HSD[:, skipped:])
    whole, part = (score(policy, SHAPE, x, evictable=(first, 192)) for x in (inputs, cut))
    # Not bit for bit: a matrix product of fewer rows may be added up in another order.
    torch.testing.assert_close(part.scores_HE, whole.scores_HE, rtol=1e-6, atol=0)
    if whole.rank_HE is not None:
        torch.testing.assert_close(part.rank_HE, whole.rank_HE, rtol=1e-6, atol=0)


def test_stage_one_asks_for_all_values() -> None:
    inputs = make_layers(SHAPE)[0]
    cut = replace(inputs, value_HSD=inputs.value_HSD[:, 48:])
    with pytest.raises(AssertionError, match="needs the values of all tokens"):
        score(PRESETS["defensivekv"], SHAPE, cut, evictable=(48, 192))


def test_a_range_that_ends_before_the_window_forces_nothing() -> None:
    part = score(PRESETS["layer-defensivekv"], SHAPE, make_layers(SHAPE)[0], evictable=(0, 128))
    assert part.scores_HE.isfinite().all()


@pytest.mark.parametrize("policy", [p for p in PUBLIC if p.scope != "head" and p.head_budget == "scope"], ids=by_name)
def test_heads_get_different_budgets_and_none_gets_all(policy: Policy) -> None:
    shape = Shape(400, heads=4, group=3, window=16)
    layers = make_layers(shape)
    scores = [score(policy, shape, x, layer=i, keep_ratio=0.3) for i, x in enumerate(layers)]
    counts = [len(kept) for kept in kept_by_head(select_tokens(policy, shape, scores, 0.3)).values()]
    assert len(set(counts)) > 1
    assert min(counts) >= shape.window and max(counts) < sum(counts)


@pytest.mark.parametrize("name", ["criticalkv", "defensivekv", "layer-defensivekv"])
def test_without_a_projection_values_weigh_nothing(name: str) -> None:
    inputs = make_layers(SHAPE)[0]
    without = score(PRESETS[name], SHAPE, inputs, output_QDM=None)
    unweighted = score(replace(PRESETS[name], value_weight="none"), SHAPE, inputs)
    assert torch.equal(without.scores_HE, unweighted.scores_HE)
    assert without.rank_HE is None


@pytest.mark.parametrize("name", ["defensivekv", "layer-defensivekv"])
def test_values_of_a_single_head_weigh_nothing(name: str) -> None:
    """The norm is divided by its sum over heads: alone, it is one."""
    shape = Shape(120, heads=1, group=4, window=8)
    inputs = make_layers(shape)[0]
    without = score(replace(PRESETS[name], value_weight="none"), shape, inputs)
    assert torch.equal(score(PRESETS[name], shape, inputs).scores_HE, without.scores_HE)


def test_random_scores_are_reproducible_and_uneven() -> None:
    shape = Shape(512, heads=4, window=16)
    inputs = make_layers(shape)[0]
    policy = PRESETS["random-uneven"]
    scores = [score(policy, shape, inputs, layer=layer) for layer in (0, 1)]
    again = score(policy, shape, inputs, layer=1, query_WQD=None, window=16)
    assert torch.equal(scores[1].scores_HE, again.scores_HE)
    assert not torch.equal(scores[0].scores_HE, scores[1].scores_HE)
    pages = select(policy, scores, page_size=16, packed_blocks=8, evictable=(0, 512)).pages_LH
    assert pages.max() >= 4 * pages.min(), "tests of uneven masks need uneven heads"


def half_of(inputs: LayerInputs, rank: int) -> LayerInputs:
    """The share of the heads that one of two tensor-parallel ranks holds."""
    query, key, value, output = (
        t.chunk(2, dim=d)[rank] for t, d in zip(vars(inputs).values(), (1, 0, 0, 0), strict=True)
    )
    return LayerInputs(query, key, value, output)


class FakeAllReduce:
    """Sums a tensor over two threads that stand for two ranks."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._all_there = threading.Barrier(2, timeout=10)

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        self._parts.append(part)
        self._all_there.wait()
        return self._parts[0] + self._parts[1]


@pytest.mark.parametrize("bias", ["reference", "true"])
@pytest.mark.parametrize(
    "name", ["adakv", "cake", "criticalkv", "defensivekv", "laprox", "lava", "layer-defensivekv", "tova"]
)
def test_two_ranks_score_as_one(name: str, bias: str) -> None:
    """Scores, ranks and what is certain. The level of what is certain is the maximum of a rank's own heads: each
    rank spends its own budget, so it stands above all that it competes with either way."""
    policy = replace(PRESETS[name], window_bias=bias)
    inputs = make_layers(SHAPE)[0]
    whole = score(policy, SHAPE, inputs)
    reduce_heads = FakeAllReduce()
    parts: dict[int, object] = {}

    def run(rank: int) -> None:
        parts[rank] = score(policy, SHAPE, half_of(inputs, rank), reduce_heads=reduce_heads)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank, expected_HE in enumerate(whole.scores_HE.chunk(2)):
        ours_HE = parts[rank].scores_HE
        level, ours_level = (whole.scores_HE, ours_HE)
        certain = expected_HE == level[level.isfinite()].max()
        ours_certain = ours_HE == ours_level[ours_level.isfinite()].max()
        if policy.stages == "mass":
            assert certain.sum() > 1
            assert (ours_certain >= certain).all() and ours_certain.sum() <= certain.sum() + 1
        else:
            ours_certain = torch.zeros_like(certain)
        torch.testing.assert_close(ours_HE[~ours_certain], expected_HE[~ours_certain], rtol=1e-5, atol=0)
        if whole.rank_HE is not None:
            torch.testing.assert_close(parts[rank].rank_HE, whole.rank_HE.chunk(2)[rank], rtol=1e-5, atol=0)
        if whole.preference is not None:
            torch.testing.assert_close(parts[rank].preference, whole.preference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduce_heads", [None, lambda part: part + part], ids=["one rank", "two ranks"])
@pytest.mark.parametrize(
    ("name", "skipped"),
    [("snapkv", 24), ("criticalkv", 0), ("criticalkv", 24), ("layer-defensivekv", 0), ("halokv", 0), ("halokv", 24)],
)
def test_layers_settled_together_score_as_each_alone(name: str, reduce_heads: object, skipped: int) -> None:
    """skipped: values that are missing at the front, as the policy can do without them."""
    policy, window, layers, heads, tokens = PRESETS[name], 8, 3, 2, 120
    generator = torch.Generator().manual_seed(7)
    mean_LHT = torch.rand(layers, heads, tokens, generator=generator).pow(8)
    mean_LHT /= 1.1 * mean_LHT.sum(dim=-1, keepdim=True)
    score_LHT = mean_LHT + torch.rand(layers, heads, tokens, generator=generator) / tokens
    norm_LHT = (
        torch.rand(layers, heads, tokens - skipped, generator=generator) * torch.tensor([1.0, 5, 9])[:, None, None]
    )
    options = {"window": window, "keep_ratio": 0.3, "evictable": (32, 128), "reduce_heads": reduce_heads}
    together = settle(policy, Attention.of(policy, score_LHT, mean_LHT, window), norm_LHT, **options).apart()
    for layer, scores in enumerate(together):
        alone = settle(
            policy, Attention.of(policy, score_LHT[layer], mean_LHT[layer], window), norm_LHT[layer], **options
        )
        assert torch.equal(scores.scores_HE, alone.scores_HE)
        assert (scores.rank_HE is None) == (alone.rank_HE is None)
        assert scores.rank_HE is None or torch.equal(scores.rank_HE, alone.rank_HE)
    assert not torch.equal(together[0].scores_HE, together[1].scores_HE)


@pytest.mark.parametrize("name", [name for name, policy in PRESETS.items() if policy.aggregate == "redundancy"])
def test_what_is_gone_resembles_nobody(name: str) -> None:
    """A head that has lost tokens scores the others as if it had never had any more."""
    policy, window = replace(PRESETS[name], pool_kernel=1), SHAPE.window
    inputs = make_layers(SHAPE)[0]
    there_HS = torch.rand(SHAPE.heads, SHAPE.tokens, generator=torch.Generator().manual_seed(2)) < 0.6
    there_HS[:, -window:] = True
    found = score(policy, SHAPE, inputs, there_HS=there_HS)
    queries = inputs.query_WQD.unflatten(1, (SHAPE.heads, -1))
    for head, there_S in enumerate(there_HS):
        left = [part[head : head + 1, there_S] for part in (inputs.key_HSD, inputs.value_HSD)]
        alone = score(
            policy, SHAPE, LayerInputs(queries[:, head], *left, inputs.output_QDM), evictable=(0, int(there_S.sum()))
        )
        torch.testing.assert_close(found.scores_HE[head, there_S], alone.scores_HE[0], rtol=1e-5, atol=1e-7)

"""Pages and tokens: exact budgets, forced tokens, ties, and the best choice there is."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.policy.cases import LayerInputs, Shape, kept_by_head, make_layers, score
from vllm_defensive.policy import PRESETS, LayerScores, Policy, Selection, select, select_within
from vllm_defensive_kernels import formulas

POLICIES = [policy for policy in PRESETS.values() if policy.name != "keep-all"]
SCOPES = [PRESETS[name] for name in ("snapkv", "adakv", "layer-defensivekv")]
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def by_name(policy: Policy) -> str:
    return policy.name


def layers_of(scores_LHE: Tensor, ranks_LHE: Tensor | None = None) -> list[LayerScores]:
    """Every layer with a weight and heads of both types: policies that have no use for these do not look."""
    ranks = [None] * len(scores_LHE) if ranks_LHE is None else list(ranks_LHE)
    weights = [torch.tensor(1.0 + layer) for layer in range(len(scores_LHE))]
    types = [torch.arange(scores_LHE.shape[1]) % 3 == layer % 3 for layer in range(len(scores_LHE))]
    return [LayerScores(*each) for each in zip(scores_LHE, ranks, weights, types, strict=True)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Policy, list[LayerScores], dict, int]:
    """(policy, scores, arguments of `select`, forced tokens a head); scores come from few values, so ties abound."""
    policy = draw(st.sampled_from(POLICIES))
    layers, heads, page_size = (draw(st.integers(1, top)) for top in (3, 3, 5))
    head_pages = draw(st.integers(1, 7))
    tokens, start = head_pages * page_size, draw(st.integers(0, 3)) * page_size
    forced = draw(st.integers(0, tokens))
    least = -(-forced // page_size)
    packed_blocks = draw(st.integers(max(least, 1), head_pages))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from([1, 3, 1000]))
    both = torch.from_numpy(rng.integers(0, values, (2, layers, heads, tokens)).astype(np.float32))
    both[..., tokens - forced :] = float("inf")
    scores = layers_of(both[0], both[1] if policy.stages == "half-budget" else None)
    arguments = {"page_size": page_size, "packed_blocks": packed_blocks, "evictable": (start, start + tokens)}
    return policy, scores, arguments, forced


@FAST
@given(problems())
def test_budgets_are_spent_to_the_page_inside_the_range(problem: tuple) -> None:
    policy, scores, arguments, forced = problem
    selection = select(policy, scores, **arguments)
    layers, heads = len(scores), len(scores[0].scores_HE)
    blocks, page_size, (start, stop) = (arguments[key] for key in ("packed_blocks", "page_size", "evictable"))
    assert selection.pages_LH.dtype == selection.tokens_PN.dtype == torch.int32
    assert selection.tokens_PN.shape == (blocks * layers * heads, page_size)
    assert selection.pages_LH.sum() == blocks * layers * heads
    if policy.scope == "layer" and policy.layer_budget == "even":
        assert (selection.pages_LH.sum(dim=1) == blocks * heads).all()
    if policy.scope == "head":
        assert (selection.pages_LH == selection.pages_LH[:, :1]).all()
        assert policy.layer_budget != "even" or (selection.pages_LH == blocks).all()
    for kept in kept_by_head(selection).values():
        assert kept == sorted(set(kept)), "positions ascend and none comes twice"
        assert not kept or (kept[0] >= start and kept[-1] < stop)
        assert set(range(stop - forced, stop)) <= set(kept), "what is forced stays"


@pytest.mark.parametrize("scope", SCOPES, ids=by_name)
def test_a_head_without_pages_keeps_nothing(scope: Policy) -> None:
    """A window that lies in the tail block forces no page, and a head may then get none."""
    scores = layers_of(torch.tensor([[[9.0, 8, 9, 7, 7, 7], [2, 1, 2, 0, 0, 0]]]))
    selection = select(scope, scores, page_size=3, packed_blocks=1, evictable=(0, 6))
    pages = selection.pages_LH.tolist()
    assert pages == [[1, 1]] if scope.scope == "head" else pages == [[2, 0]]
    assert [len(kept) for kept in kept_by_head(selection).values()] == [3 * n for n in pages[0]]


@FAST
@given(problems())
def test_the_same_scores_give_the_same_tokens(problem: tuple) -> None:
    policy, scores, arguments, _ = problem
    first, second = (select(policy, scores, **arguments) for _ in range(2))
    assert torch.equal(first.pages_LH, second.pages_LH) and torch.equal(first.tokens_PN, second.tokens_PN)


@FAST
@given(problems(), st.data())
def test_a_larger_budget_keeps_all_that_a_smaller_one_kept(problem: tuple, data: st.DataObject) -> None:
    """For one set of scores. Not for half-budget (what is certain moves with the budget) and not across keep ratios
    of "mass" (its cap, so its scores, moves with them)."""
    policy, scores, arguments, _ = problem
    if policy.stages == "half-budget":
        scores = [replace(layer, rank_HE=None) for layer in scores]
    start, stop = arguments["evictable"]
    more = data.draw(st.integers(arguments["packed_blocks"], (stop - start) // arguments["page_size"]))
    small = kept_by_head(select(policy, scores, **arguments))
    large = kept_by_head(select(policy, scores, **{**arguments, "packed_blocks": more}))
    assert all(set(small[at]) <= set(large[at]) for at in small)


@pytest.mark.parametrize("policy", SCOPES, ids=by_name)
def test_ties_go_to_the_lowest_layer_head_and_token(policy: Policy) -> None:
    scores = layers_of(torch.ones(2, 3, 8))
    selection = select_within(policy, scores, page_size=2, budget_pages=3, guard_pages=0, evictable=(8, 16))
    expected = {
        "head": [[3, 3, 3], [3, 3, 3]],
        "layer": [[3, 0, 0], [3, 0, 0]],
        "model": [[3, 0, 0], [0, 0, 0]],
    }
    assert selection.pages_LH.tolist() == expected[policy.scope]
    assert all(kept == list(range(8, 8 + len(kept))) for kept in kept_by_head(selection).values())


def total_score(selection: Selection, scores_LHE: Tensor, start: int) -> float:
    kept = kept_by_head(selection)
    return sum(scores_LHE[layer, head, t - start].item() for (layer, head), tokens in kept.items() for t in tokens)


@pytest.mark.parametrize("policy", SCOPES, ids=by_name)
@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_pages_are_the_best_there_are(policy: Policy, seed: int) -> None:
    """Every way to hand out the pages, tried: none adds up to more (Ada-KV's objective, in whole pages)."""
    layers, heads, head_pages, page_size, blocks = 2, 2, 3, 3, 2
    generator = torch.Generator().manual_seed(seed)
    scores_LHE = torch.randint(0, 50, (layers, heads, head_pages * page_size), generator=generator).float()
    ours = select_within(
        policy,
        layers_of(scores_LHE),
        page_size=page_size,
        budget_pages=blocks * {"head": 1, "layer": heads, "model": layers * heads}[policy.scope],
        guard_pages=0,
        evictable=(0, head_pages * page_size),
    )
    sorted_RE = scores_LHE.flatten(0, 1).sort(dim=-1, descending=True).values
    best = 0.0
    for pages in itertools.product(range(head_pages + 1), repeat=layers * heads):
        by_layer = np.reshape(pages, (layers, heads))
        if by_layer.sum() != blocks * layers * heads:
            continue
        if policy.scope == "layer" and (by_layer.sum(axis=1) != blocks * heads).any():
            continue
        if policy.scope == "head" and (by_layer != blocks).any():
            continue
        best = max(best, sum(sorted_RE[r, : n * page_size].sum().item() for r, n in enumerate(pages)))
    assert total_score(ours, scores_LHE, 0) == best


def test_a_guard_keeps_pages_from_the_competition() -> None:
    scores_LHE = torch.stack([torch.full((8,), 9.0), torch.ones(8)])[None]
    arguments = {"page_size": 1, "budget_pages": 8, "evictable": (0, 8)}
    alone = select_within(PRESETS["adakv"], layers_of(scores_LHE), guard_pages=0, **arguments)
    guarded = select_within(PRESETS["adakv"], layers_of(scores_LHE), guard_pages=2, **arguments)
    assert alone.pages_LH.tolist() == [[8, 0]]
    assert guarded.pages_LH.tolist() == [[6, 2]]


def test_half_of_a_budget_goes_by_score_and_half_by_rank() -> None:
    scores = torch.tensor([[[9.0, 8, 7, 6, 5, 4, 3, 2]]])
    ranks = torch.tensor([[[0.0, 1, 2, 3, 4, 5, 6, 7]]])
    arguments = {"page_size": 1, "budget_pages": 5, "guard_pages": 0, "evictable": (0, 8)}
    selection = select_within(PRESETS["criticalkv"], layers_of(scores, ranks), **arguments)
    assert kept_by_head(selection)[0, 0] == [0, 1, 5, 6, 7], "int(5 / 2) by score"


def test_nan_scores_of_a_broken_model_still_give_valid_positions() -> None:
    scores_LHE = torch.full((2, 2, 12), float("nan"))
    scores_LHE[:, :, 10:] = float("inf")
    selection = select(
        PRESETS["layer-defensivekv"], layers_of(scores_LHE), page_size=4, packed_blocks=2, evictable=(4, 16)
    )
    assert selection.pages_LH.sum() == 8
    assert all(len(set(kept)) == len(kept) for kept in kept_by_head(selection).values())
    assert selection.tokens_PN.min() >= 4 and selection.tokens_PN.max() < 16


@pytest.mark.parametrize("policy", PRESETS.values(), ids=by_name)
def test_nothing_waits_for_the_device(policy: Policy) -> None:
    """Meta tensors have shapes and no values: whatever read one back, or made a shape of one, would raise."""
    shape = Shape(120, heads=2, group=3, window=8, layers=3)
    scores = []
    for layer, inputs in enumerate(make_layers(shape)):
        on_meta = LayerInputs(*(tensor.to("meta") for tensor in vars(inputs).values()))
        scores.append(score(policy, shape, on_meta, layer=layer, evictable=(16, 112)))
    asked: dict = {}

    def kernel(*tensors: Tensor, **numbers: int) -> Tensor:
        asked.update(numbers)
        return torch.empty(12, 16, device="meta")

    selection = select(policy, scores, page_size=16, packed_blocks=2, evictable=(16, 112), list_kept=kernel)
    assert selection.pages_LH.shape == (3, 2) and selection.offset_O.shape == (7,)
    assert asked == {"pages": 12, "page_tokens": 16, "first_token": 16}


@pytest.mark.parametrize("values", [2, 5, 10**6])
def test_rows_are_marked_the_same_whether_ties_are_counted_in_all_of_them_or_where_there_are_any(values: int) -> None:
    """The latter on CPUs, which may look; the former elsewhere."""
    scores_RE = torch.randint(0, values, (40, 12), generator=torch.Generator().manual_seed(values)).float()
    scores_RE[:, 10:] = float("inf")
    count_R = torch.arange(40) % 13
    last_R1 = formulas.last_value(formulas.sort_down(scores_RE), count_R)
    keep_RE = formulas.keep_down_to(scores_RE, count_R, last_R1)
    assert torch.equal(keep_RE, formulas._first_down_to(scores_RE, count_R, last_R1))
    assert torch.equal(keep_RE.sum(dim=1), count_R)


@pytest.mark.parametrize("name", ["adakv", "criticalkv", "layer-defensivekv"])
def test_long_prompts_are_sorted_in_parts_with_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = torch.rand(2, 5, 2, 60, generator=torch.Generator().manual_seed(0))
    scores = layers_of(both[0], both[1] if name == "criticalkv" else None)
    arguments = {"page_size": 4, "packed_blocks": 3, "evictable": (0, 60)}
    whole = select(PRESETS[name], scores, **arguments)
    monkeypatch.setattr("vllm_defensive_kernels.formulas.SORT_ELEMENTS", 250)
    parts = select(PRESETS[name], scores, **arguments)
    assert torch.equal(whole.tokens_PN, parts.tokens_PN) and torch.equal(whole.pages_LH, parts.pages_LH)


@pytest.mark.parametrize("page_size, blocks", [(5, 4), (4, 4), (4, 0)])
def test_impossible_budgets_are_bugs(page_size: int, blocks: int) -> None:
    with pytest.raises(AssertionError):
        select(
            PRESETS["snapkv"],
            layers_of(torch.ones(1, 1, 12)),
            page_size=page_size,
            packed_blocks=blocks,
            evictable=(0, 12),
        )

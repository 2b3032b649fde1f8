"""Pages handed out by score, and the tokens that fill them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import int32, randn
from vllm_defensive_kernels import PageSelection, formulas, select_pages, selection


def tokens_of(result: PageSelection, page_tokens: int) -> list[list[int]]:
    """Kept tokens of each head."""
    ends = [page * page_tokens for page in result.offset_O.tolist()]
    return [result.token_T[begin:end].tolist() for begin, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
@pytest.mark.parametrize(("layers", "heads", "pages", "page_tokens", "budget"), [
    (2, 3, 9, 7, 2), (1, 1, 1, 5, 1), (3, 2, 4, 16, 4), (2, 1, 6, 1, 3),
])  # fmt: skip
def test_selection_is_the_optimum_of_its_scope(
    scope: str, layers: int, heads: int, pages: int, page_tokens: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "BLOCK", 16)  # several blocks a head
    score = randn(layers, heads, pages * page_tokens).abs()
    result = select_pages(score, budget, page_tokens, scope=scope, first_token=100)
    counts = result.offset_O.diff().view(layers, heads)
    assert result.offset_O[0] == 0
    groups = {"head": counts.flatten(), "layer": counts.sum(1), "model": counts.sum()[None]}[scope]
    assert (groups == budget * layers * heads // groups.numel()).all()
    kept = tokens_of(result, page_tokens)
    total = 0.0
    for row, (tokens, count) in enumerate(zip(kept, counts.flatten().tolist(), strict=True)):
        assert tokens == sorted(set(tokens))
        best = score.view(-1, pages * page_tokens)[row].sort(descending=True).values[: count * page_tokens]
        chosen = score.view(-1, pages * page_tokens)[row][torch.tensor(tokens, dtype=torch.long) - 100]
        assert torch.equal(chosen.sort(descending=True).values, best)
        total += float(best.sum())
    assert total == pytest.approx(best_by_force(score, budget, page_tokens, scope), rel=1e-6)


def best_by_force(score: Tensor, budget: int, page_tokens: int, scope: str) -> float:
    """Largest total score of whole pages: dynamic programming over heads, for each unit that shares a budget."""
    layers, heads, _ = score.shape
    unit = {"head": 1, "layer": heads, "model": layers * heads}[scope]
    ranked = score.view(-1, unit, score.shape[2]).sort(dim=-1, descending=True).values.double()
    total = 0.0
    for heads_of_unit in ranked:
        best = {0: 0.0}
        for row in heads_of_unit:
            value = [0.0, *row.view(-1, page_tokens).sum(1).cumsum(0).tolist()]
            sums: dict[int, float] = {}
            for (used, gained), (more, extra) in itertools.product(best.items(), enumerate(value)):
                if used + more <= budget * unit:
                    sums[used + more] = max(sums.get(used + more, -1.0), gained + extra)
            best = sums
        total += best[budget * unit]
    return total


def test_ties_go_to_the_lowest_layer_head_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BLOCK", 4)
    result = select_pages(torch.ones(2, 2, 12, device=int32(0).device), 1, 3, scope="model")
    assert result.offset_O.tolist() == [0, 4, 4, 4, 4]
    assert result.token_T.tolist() == list(range(12))
    result = select_pages(torch.zeros(1, 2, 12, device=int32(0).device), 2, 3, scope="head")
    assert tokens_of(result, 3) == [list(range(6))] * 2


def test_ties_across_blocks_keep_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BLOCK", 4)
    score = torch.tensor([[[1.0, 5, 1, 1, 1, 1, 9, 1, 1, 7]]], device=int32(0).device)
    assert select_pages(score, 3, 2, scope="head").token_T.tolist() == [0, 1, 2, 3, 6, 9]


def test_forced_tokens_and_the_floor_are_kept_by_every_head() -> None:
    score = randn(2, 2, 40).abs()
    score[0] *= 1000  # the first layer would take everything
    before = score.clone()
    result = select_pages(score, 3, 4, scope="model", forced_tokens=5, min_pages=2)
    assert torch.equal(score, before)
    assert (result.offset_O.diff() >= 2).all()
    assert all(set(range(35, 40)) <= set(tokens) for tokens in tokens_of(result, 4))


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_layer_budgets(scope: str) -> None:
    result = select_pages(randn(3, 2, 40).abs(), 4, 4, scope=scope, layer_budget_L=int32(7, 4, 1))
    counts = result.offset_O.diff().view(3, 2)
    assert counts.sum(1).tolist() == [14, 8, 2]
    if scope == "head":
        assert counts.tolist() == [[7, 7], [4, 4], [1, 1]]


def test_selection_equals_the_formulas_that_the_engine_uses_on_the_cpu() -> None:
    score = randn(2, 3, 63).abs().round(decimals=1)  # many ties
    result = select_pages(score, 4, 7, scope="layer")
    ranked = score.view(6, 63).sort(dim=-1, descending=True).values
    pages = formulas.allocate_pages(formulas.page_gains(ranked, 7).view(2, 3, 9), 12)
    keep = formulas.keep_best(score.view(6, 63), pages.flatten() * 7)
    assert result.offset_O.diff().tolist() == pages.flatten().tolist()
    assert torch.equal(result.token_T, formulas.packed_positions(keep, pages.flatten() * 7, 2 * 3 * 4 * 7, 0))


@pytest.mark.parametrize(("change", "message"), [
    ({"budget_pages": 11}, "budget_pages=11: choose 0 to 10"),
    ({"scope": "all"}, "scope='all': choose 'head' or 'layer' or 'model'"),
    ({"page_tokens": 7}, r"score_LHE.shape\[2\]=40: choose a multiple of page_tokens=7"),
    ({"forced_tokens": 9}, "forced_tokens=9: choose 0 to 8"),
])  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_pages(randn(1, 1, 40), **{"budget_pages": 2, "page_tokens": 4, **change})

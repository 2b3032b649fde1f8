"""The tokens that fill each head's pages, listed. What is chosen, and that it is the best, is for tests/policy."""

from __future__ import annotations

import itertools

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from tests.kernels.cases import int32, randn, select_pages
from tests.kernels.conftest import DEVICE
from vllm_defensive.packing import Format, Part
from vllm_defensive.policy import PRESETS, LayerScores, select, select_packed
from vllm_defensive_kernels import formulas, list_kept, reference, selection


@pytest.fixture(autouse=True)
def several_blocks_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BLOCK", 16)


@pytest.mark.parametrize("values", [1, 3, 10**6])
@pytest.mark.parametrize(("page_tokens", "counts"), [(7, [4, 0, 9, 1]), (1, [63, 5, 0]), (16, [2, 2])])
def test_exactly_the_best_are_listed_in_order_and_of_equals_the_first(
    page_tokens: int, counts: list[int], values: int
) -> None:
    tokens = 63 if 63 % page_tokens == 0 else 64
    score_RE = (randn(len(counts), tokens).abs() * values).round() if values < 10**6 else randn(len(counts), tokens)
    score_RE[:, -3:] = float("inf")
    offset_O = int32(0, *itertools.accumulate(counts))
    count_R = offset_O.diff().long() * page_tokens
    last_R1 = formulas.last_value(score_RE.sort(dim=-1, descending=True).values, count_R)
    options = {"pages": sum(counts), "page_tokens": page_tokens, "first_token": 100}
    listed_PN = list_kept(score_RE, last_R1, offset_O, **options)
    assert listed_PN.dtype == torch.int32 and listed_PN.shape == (sum(counts), page_tokens)
    assert torch.equal(listed_PN, reference.list_kept(score_RE, last_R1, offset_O, **options))
    for row, listed in enumerate(listed_PN.split(counts)):
        order = sorted(range(tokens), key=lambda t: (-float(score_RE[row, t]), t))
        assert listed.flatten().tolist() == sorted(100 + t for t in order[: int(count_R[row])])


@pytest.mark.parametrize("values", [1, 3, 10**6])
@pytest.mark.parametrize("sizes", [(7, 11), (16, 5, 9)])
def test_what_is_listed_elsewhere_is_left_out(sizes: tuple[int, ...], values: int) -> None:
    """Classes one after the other: the best tokens in the first one's pages. Rows without pages of one of them, or of
    any, and rows that have fewer tokens than room, or none left at all."""
    tokens = 63
    counts = [[2, 0, 4, 1, 0, 9, 3], [3, 2, 0, 6, 0, 2, 4], [0, 3, 1, 1, 0, 1, 5]][: len(sizes)]
    score_RE = (randn(7, tokens).abs() * values).round() if values < 10**6 else randn(7, tokens)
    score_RE[:, -4:] = float("inf")
    sorted_RE = score_RE.sort(dim=-1, descending=True).values
    taken_R, last_R1 = torch.zeros(7, dtype=torch.int64, device=DEVICE), None
    order = [sorted(range(tokens), key=lambda t: (-float(row[t]), t)) for row in score_RE]
    for size, pages_of_row in zip(sizes, counts, strict=True):
        offset_O, before_R = int32(0, *itertools.accumulate(pages_of_row)), taken_R
        taken_R = (before_R + offset_O.diff() * size).clamp_max(tokens)
        before_R1, last_R1 = last_R1, formulas.last_value(sorted_RE, taken_R)
        options = {"pages": sum(pages_of_row), "page_tokens": size, "first_token": 100}
        if before_R1 is not None:
            options |= {"taken_R": before_R, "taken_last_R1": before_R1}
        listed_PN = list_kept(score_RE, last_R1, offset_O, **options)
        assert torch.equal(listed_PN, reference.list_kept(score_RE, last_R1, offset_O, **options))
        for row, listed in enumerate(listed_PN.split(pages_of_row)):
            expected = sorted(100 + t for t in order[row][int(before_R[row]) : int(taken_R[row])])
            assert listed.flatten().tolist() == expected + [-1] * (listed.numel() - len(expected))


def one_of_each_kind() -> list[ParameterSet]:
    """Policies; of those that are selected in the same way all but the first are slow."""
    seen, parameters = set(), []
    for policy in PRESETS.values():
        kind = (policy.scope, policy.layer_budget, policy.head_budget, policy.stages, policy.guard, policy.keep_all)
        marks = [pytest.mark.slow] if kind in seen else []
        parameters.append(pytest.param(policy, id=policy.name, marks=marks))
        seen.add(kind)
    return parameters


@pytest.mark.parametrize("policy", one_of_each_kind())
@pytest.mark.parametrize("decimals", [0, 6])
def test_every_policy_keeps_the_same_with_the_kernel_and_without(policy, decimals: int) -> None:  # type: ignore[no-untyped-def]
    both = randn(2, 3, 2, 96).abs().round(decimals=decimals)  # 0 decimals: many ties
    both[..., -20:] = float("inf")
    both[0, 0, 0, 3] = float("nan")
    ranks = both[1] if policy.stages == "half-budget" else [None] * 3
    weights = (torch.tensor(1.0 + layer, device=DEVICE) for layer in range(3))
    types = torch.arange(6, device=DEVICE).view(3, 2) % 3 == 0
    scores = [LayerScores(*each) for each in zip(both[0], ranks, weights, types, strict=True)]
    options = {"page_size": 8, "packed_blocks": 5, "evictable": (16, 112)}
    with_kernel, without = (select(policy, scores, list_kept=op, **options) for op in (list_kept, reference.list_kept))
    assert torch.equal(with_kernel.pages_LH, without.pages_LH)
    assert torch.equal(with_kernel.tokens_PN, without.tokens_PN)


@pytest.mark.parametrize("policy", [PRESETS[name] for name in ("halokv", "snapkv", "criticalkv")], ids=lambda p: p.name)
@pytest.mark.parametrize("parts", [(("k8v4", 20, 1.0),), (("8", 14, 0.25), ("4", 27, 1.0))], ids=["k8v4", "8,4"])
@pytest.mark.parametrize("pages", [2, 5])
def test_pages_of_several_classes_hold_the_same_with_the_kernel_and_without(policy, parts, pages: int) -> None:  # type: ignore[no-untyped-def]
    """Many ties; of 5 pages a head some have room left."""
    both = randn(2, 3, 2, 96).abs().round()
    both[..., -10:] = float("inf")
    ranks = both[1] if policy.stages == "half-budget" else [None] * 3
    scores = [LayerScores(*each) for each in zip(both[0], ranks, strict=True)]
    format = Format("k8v4", tuple(Part(*part) for part in parts), 16)
    options = {"head_pages": pages, "forced_tokens": 10, "evictable": (16, 112)}
    ops = (list_kept, reference.list_kept)
    with_kernel, without = (select_packed(policy, scores, format, list_kept=op, **options) for op in ops)
    assert len(with_kernel) == len(without) == len(parts)
    for one, other in zip(with_kernel, without, strict=True):
        assert torch.equal(one.pages_LH, other.pages_LH) and torch.equal(one.tokens_PN, other.tokens_PN)
    held = torch.cat([part.tokens_PN.flatten() for part in with_kernel])
    assert bool((held == -1).any()) == (pages == 5)


def test_ties_across_blocks_keep_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BLOCK", 4)
    score: Tensor = torch.tensor([[[1.0, 5, 1, 1, 1, 1, 9, 1, 1, 7]]], device=DEVICE)
    assert select_pages(score, 3, 2).tokens_PN.flatten().tolist() == [0, 1, 2, 3, 6, 9]


@pytest.mark.parametrize(("change", "message"), [
    ({"pages": 11}, "pages=11: choose 0 to 10"),
    ({"page_tokens": 0}, "page_tokens=0: choose 1 or more"),
    ({"offset_O": int32(0, 1, 2)}, r"offset_O.shape=\(3,\): choose \[2\]"),
    ({"last_R1": torch.zeros(1, 1, dtype=torch.float64)}, r"last_R1.dtype=torch.float64: choose torch.float32"),
    ({"taken_R": torch.zeros(1).long()}, "taken_last_R1=None: choose what goes with taken_R"),
    ({"score_RE": torch.zeros(40, 1).mT[:, ::2]}, r"score_RE.stride\(\)=.*: choose contiguous rows"),
])  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "score_RE": randn(1, 40), "last_R1": randn(1, 1), "offset_O": int32(0, 2),
        "pages": 2, "page_tokens": 4, "first_token": 0, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        list_kept(**arguments)

"""From the scores of all layers to the pages and tokens that stay. This is where a kept token is chosen, on any device.

Axes: L layers, H KV heads, R = L*H rows, E evictable tokens, N tokens a page, J = E/N, P pages kept in all,
O = R + 1 page offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from vllm_defensive.policy.budget import guarded
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import LayerScores
from vllm_defensive_kernels import formulas, reference

# Of a page, beside 1 / (j + 1/2) for page j of a head that is not local: below all of them, and above.
LOCAL_BID, ENDS_BID = 1e-9, 1e9


class ListKept(Protocol):
    """`vllm_defensive_kernels.list_kept`, which runs where Triton does, or its reference."""

    def __call__(
        self, score_RE: Tensor, last_R1: Tensor, offset_O: Tensor, *, pages: int, page_tokens: int, first_token: int
    ) -> Tensor: ...


@dataclass
class Selection:
    """What stays, head after head: (layer 0, head 0), (layer 0, head 1), ..."""

    pages_LH: Tensor
    """int32: pages of each head."""
    tokens_PN: Tensor
    """int32: absolute positions, ascending within each head."""

    @cached_property
    def offset_O(self) -> Tensor:
        """int32: the first page of each head, and behind them how many there are."""
        return _offsets(self.pages_LH.flatten())


def select(
    policy: Policy,
    scores: Sequence[LayerScores],
    *,
    page_size: int,
    packed_blocks: int,
    evictable: tuple[int, int],
    list_kept: ListKept = reference.list_kept,
) -> Selection:
    """Choose exactly `packed_blocks` * L * H pages, of `page_size` tokens each, from the range `evictable`.

    Each head gets at least the pages that its forced (+inf) tokens fill, provided `packed_blocks` suffices for them.
    Equal scores: the lowest (layer, head, token) wins. Nothing is read back from a GPU.
    list_kept: how the tokens are listed, once it is known how many each head keeps; the kernel, where Triton runs.
    """
    layers, heads = len(scores), scores[0].scores_HE.shape[0]
    sharers = {"head": 1, "layer": heads, "model": layers * heads}[policy.scope]
    return select_within(
        policy,
        scores,
        page_size=page_size,
        budget_pages=packed_blocks * sharers,
        guard_pages=guarded(policy.guard, packed_blocks),
        evictable=evictable,
        list_kept=list_kept,
    )


def select_within(
    policy: Policy,
    scores: Sequence[LayerScores],
    *,
    page_size: int,
    budget_pages: int,
    guard_pages: int,
    evictable: tuple[int, int],
    list_kept: ListKept = reference.list_kept,
) -> Selection:
    """`select` with a budget for each head, layer or model (the policy's scope) that need not divide evenly.

    With pages of one token and `reference_budget` this keeps what the reference implementation keeps.
    """
    layers, (heads, tokens) = len(scores), scores[0].scores_HE.shape
    start, stop = evictable
    assert tokens == stop - start and tokens % page_size == 0, (
        f"{tokens} scores for {evictable} in pages of {page_size}"
    )
    head_pages = tokens // page_size
    units = {"head": layers * heads, "layer": layers, "model": 1}[policy.scope]
    assert 0 < budget_pages <= head_pages * layers * heads // units, f"{budget_pages} pages do not fit in {units}"

    score_RE = _rows([layer.scores_HE for layer in scores])
    halves = policy.stages == "half-budget" and scores[0].rank_HE is not None
    at_once = formulas.rows_at_once(score_RE, thrifty=halves)  # ranks take as much memory as scores
    gains_RJ, last_RJ = _gains(score_RE, page_size, at_once)
    gains_UHJ = gains_RJ.view(units, -1, head_pages)
    if policy.layer_budget != "even":
        budget_pages -= budget_pages % gains_UHJ.shape[1]  # a layer's is so many pages for each of its heads
    pages_R = _allocate(policy, scores, gains_UHJ, budget_pages, guard_pages, start)
    last_R1 = formulas.last_value(last_RJ, pages_R)
    if halves:
        score_RE, last_R1 = _half_by_rank(score_RE, [layer.rank_HE for layer in scores], pages_R * page_size, at_once)
    tokens_PN = list_kept(
        score_RE,
        last_R1,
        _offsets(pages_R),
        pages=budget_pages * units,
        page_tokens=page_size,
        first_token=start,
    )
    return Selection(pages_R.view(layers, heads).int(), tokens_PN)


def _allocate(
    policy: Policy, scores: Sequence[LayerScores], gains_UHJ: Tensor, budget_pages: int, guard_pages: int, start: int
) -> Tensor:
    """Pages of each row, int64 [R]. U units share a budget each, of as many heads."""
    if policy.head_budget == "typed":
        bids_UHJ = _bids_by_type(scores, gains_UHJ, ends=start < policy.sinks)
        return formulas.allocate_pages(bids_UHJ, budget_pages).flatten()
    if policy.layer_budget == "even":
        gains_UHJ[..., :guard_pages] = float("inf")
        return formulas.allocate_pages(gains_UHJ, budget_pages).flatten()
    forced_J, sharers = gains_UHJ[0, 0].isinf(), gains_UHJ.shape[1]  # the same in all heads
    each_L = formulas.proportional_pages(
        _layer_weights(policy, scores), forced_J, budget_pages // sharers * len(scores)
    )
    if policy.scope == "head":
        return each_L.repeat_interleave(scores[0].scores_HE.shape[0])
    guard_L11 = (policy.guard * each_L.double()).long()[:, None, None]
    guarded_J = torch.arange(gains_UHJ.shape[2], device=each_L.device) < guard_L11
    return formulas.allocate_pages(gains_UHJ.masked_fill(guarded_J, float("inf")), each_L * sharers).flatten()


def _bids_by_type(scores: Sequence[LayerScores], gains_UHJ: Tensor, ends: bool) -> Tensor:
    """For `allocate_pages`: a local head has its forced pages and, where the prompt's first tokens may go (`ends`), one
    more for these; the others split what is left evenly, and only when they are full local heads get more. fp32
    [U, H, J]."""
    local_UH1 = torch.stack([layer.local_H for layer in scores if layer.local_H is not None]).view_as(
        gains_UHJ[..., :1]
    )
    page_J = torch.arange(gains_UHJ.shape[2], device=gains_UHJ.device)
    bids_UHJ = torch.where(local_UH1, LOCAL_BID, 1.0) / (page_J + 0.5)
    forced_J = gains_UHJ[0, 0].isinf()  # the same in all heads
    if ends:
        bids_UHJ = torch.where(page_J == forced_J.sum(), ENDS_BID, bids_UHJ)
    return torch.where(forced_J, float("inf"), bids_UHJ)


def _layer_weights(policy: Policy, scores: Sequence[LayerScores]) -> Tensor:
    """What each layer's budget is proportional to. fp32 [L]"""
    if policy.layer_budget == "linear":
        return formulas.linear_weights(len(scores), scores[0].scores_HE.device)
    return torch.stack([layer.preference for layer in scores if layer.preference is not None])


def _rows(layers_HE: Sequence[Tensor]) -> Tensor:
    """The rows of all layers below each other, a copy, fp32 [R, E]. NaN, which only a broken model yields, becomes
    zero: the counts must come out exact, because positions are addresses later."""
    return torch.cat(list(layers_HE)).nan_to_num_(nan=0.0, posinf=float("inf"))


def _gains(score_RE: Tensor, page_size: int, at_once: int) -> tuple[Tensor, Tensor]:
    """Of each page that a row could fill, its best tokens first, the score that it adds and the lowest in it. Each fp32
    [R, J]."""
    gains, lasts = [], []
    for some_RE in score_RE.split(at_once):
        sorted_RE = formulas.sort_down(some_RE)
        gains.append(formulas.page_gains(sorted_RE, page_size))
        lasts.append(sorted_RE[:, page_size - 1 :: page_size].clone())  # a copy: the sorted scores may go
    return torch.cat(gains), torch.cat(lasts)


def _half_by_rank(
    score_RE: Tensor, ranks_HE: Sequence[Tensor | None], count_R: Tensor, at_once: int
) -> tuple[Tensor, Tensor]:
    """CriticalKV: half of a row's tokens by score, the rest by rank among what is left. -> (fp32 [R, E], [R, 1]), by
    which to choose all of them, and the lowest of it that is kept."""
    present_HE = [rank_HE for rank_HE in ranks_HE if rank_HE is not None]
    assert len(present_HE) == len(ranks_HE), "some layers have a rank and some have none"
    rank_RE, lasts = _rows(present_HE), []
    for scores, ranks, counts in zip(*(each.split(at_once) for each in (score_RE, rank_RE, count_R)), strict=True):
        ranks.masked_fill_(formulas.keep_best(scores, counts // 2), float("inf"))
        lasts.append(formulas.last_value(formulas.sort_down(ranks), counts))
    return rank_RE, torch.cat(lasts)


def _offsets(pages_R: Tensor) -> Tensor:
    """int [R] pages -> int32 [R + 1], the first page of each row."""
    return torch.nn.functional.pad(pages_R.cumsum(0), (1, 0)).int()

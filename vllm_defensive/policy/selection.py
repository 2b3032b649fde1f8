"""From the scores of all layers to the pages and tokens that stay. This is where a kept token is chosen, on any device.

Axes: L layers, H KV heads, R = L*H rows, E evictable tokens, N tokens a page, J = E/N, P pages kept in all,
O = R + 1 page offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from vllm_defensive.packing import LADDER, Format
from vllm_defensive.policy.budget import guarded
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.ladder import least_distorted
from vllm_defensive.policy.layer import LayerScores
from vllm_defensive_kernels import formulas, reference

NOTHING = -1e30
"""The score of an empty place among those that are chosen from: below all others, and of sums of them, less the more
there are."""
# Of a page, beside 1 / (j + 1/2) for page j of a head that is not local: below all of them, and above.
LOCAL_BID, ENDS_BID = 1e-9, 1e9


class ListKept(Protocol):
    """`vllm_defensive_kernels.list_kept`, which runs where Triton does, or its reference."""

    def __call__(
        self,
        score_RE: Tensor,
        last_R1: Tensor,
        offset_O: Tensor,
        *,
        pages: int,
        page_tokens: int,
        first_token: int,
        taken_R: Tensor | None = None,
        taken_last_R1: Tensor | None = None,
    ) -> Tensor: ...


@dataclass
class Selection:
    """What stays in pages of one class, head after head: (layer 0, head 0), (layer 0, head 1), ..."""

    pages_LH: Tensor
    """int32: pages of each head."""
    tokens_PN: Tensor
    """int32: absolute positions, ascending within each head; -1 where a head's last page has room left."""

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
    format = Format.plain(page_size)
    (selection,) = select_packed(
        policy, scores, format, head_pages=packed_blocks, forced_tokens=0, evictable=evictable, list_kept=list_kept
    )
    return selection


def select_packed(
    policy: Policy,
    scores: Sequence[LayerScores],
    format: Format,
    *,
    head_pages: int,
    forced_tokens: int,
    evictable: tuple[int, int],
    list_kept: ListKept = reference.list_kept,
) -> tuple[Selection, ...]:
    """`select` for pages of several classes, `head_pages` * L * H in all: a selection for each part of the format. A
    head's best tokens are in the first part's pages.

    forced_tokens: of each head, +inf. Where the pages have more room than there are tokens, some stay empty in part.
    """
    assert head_pages > 0, "nothing would be kept"
    if format.widths == LADDER:
        return _select_by_distortion(scores, format, head_pages, evictable, list_kept)
    layers, heads = len(scores), scores[0].scores_HE.shape[0]
    sharers = {"head": 1, "layer": heads, "model": layers * heads}[policy.scope]
    each = format.split(head_pages, 1, forced_tokens)  # of a head, in an even split
    budgets = format.split(head_pages * sharers, sharers, forced_tokens)
    if policy.layer_budget != "even":  # a layer's is so many pages for each of its heads, of every part
        budgets = [pages * sharers for pages in each]
    return _select(
        policy,
        scores,
        page_sizes=[part.tokens for part in format.parts],
        budgets=budgets,
        guards=[guarded(policy.guard, pages) for pages in each],
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
    (selection,) = _select(
        policy,
        scores,
        page_sizes=[page_size],
        budgets=[budget_pages],
        guards=[guard_pages],
        evictable=evictable,
        list_kept=list_kept,
    )
    return selection


@dataclass(frozen=True)
class _Chosen:
    """What the pages of one part hold of each row. pages: of all rows; page_tokens: of each.

    pages_R int64; upto_R int64: tokens in these pages and in those of the parts before; last_R1 fp32: the lowest score
    among them, +inf of a row that has none.
    """

    pages: int
    page_tokens: int
    pages_R: Tensor
    upto_R: Tensor
    last_R1: Tensor


def _select_by_distortion(
    scores: Sequence[LayerScores], format: Format, head_pages: int, evictable: tuple[int, int], list_kept: ListKept
) -> tuple[Selection, ...]:
    """The ladder's pages, as many for each head. Reads the counts back."""
    score_RE = _rows([layer.scores_HE for layer in scores])
    sorted_RE = formulas.sort_down(score_RE)
    upto_R, chosen = torch.zeros(len(score_RE), dtype=torch.int64, device=score_RE.device), []
    for part, pages_R in zip(format.parts, least_distorted(sorted_RE, format, head_pages), strict=True):
        upto_R = (upto_R + pages_R * part.tokens).clamp_max(sorted_RE.shape[1])
        last_R1 = formulas.last_value(sorted_RE, upto_R)
        chosen.append(_Chosen(int(pages_R.sum()), part.tokens, pages_R, upto_R, last_R1))
    return _listed(score_RE, chosen, len(scores), evictable[0], list_kept)


def _select(
    policy: Policy,
    scores: Sequence[LayerScores],
    *,
    page_sizes: Sequence[int],
    budgets: Sequence[int],
    guards: Sequence[int],
    evictable: tuple[int, int],
    list_kept: ListKept,
) -> tuple[Selection, ...]:
    """Part by part: pages of one size, a budget of them for each unit, for the tokens that the parts before left."""
    layers, (heads, tokens) = len(scores), scores[0].scores_HE.shape
    start, stop = evictable
    assert tokens == stop - start, f"{tokens} scores for {evictable}"
    units = {"head": layers * heads, "layer": layers, "model": 1}[policy.scope]

    score_RE = _rows([layer.scores_HE for layer in scores])
    halves = policy.stages == "half-budget" and scores[0].rank_HE is not None
    at_once = formulas.rows_at_once(score_RE, thrifty=halves)  # ranks take as much memory as scores
    taken_R: Tensor | None = None
    chosen: list[_Chosen] = []
    for page_size, budget_pages, guard_pages in zip(page_sizes, budgets, guards, strict=True):
        gains_RJ, last_RJ = _gains(score_RE, page_size, at_once, taken_R)
        gains_UHJ = gains_RJ.view(units, layers * heads // units, -1)
        most = gains_UHJ.shape[1] * gains_UHJ.shape[2]
        assert 0 <= budget_pages <= most, f"{budget_pages} pages do not fit in {units}"
        if policy.layer_budget != "even":
            budget_pages -= budget_pages % gains_UHJ.shape[1]  # a layer's is so many pages for each of its heads
        pages_R = _allocate(policy, scores, gains_UHJ, budget_pages, guard_pages, start)
        before_R = 0 if taken_R is None else taken_R
        taken_R = (before_R + pages_R * page_size).clamp_max(tokens)
        last_R1 = formulas.last_value(last_RJ, pages_R)
        chosen.append(_Chosen(budget_pages * units, page_size, pages_R, taken_R, last_R1))
    if halves:
        counts = [part.upto_R for part in chosen]
        score_RE, lasts = _half_by_rank(score_RE, [layer.rank_HE for layer in scores], counts, at_once)
        chosen = [replace(part, last_R1=last_R1) for part, last_R1 in zip(chosen, lasts, strict=True)]
    return _listed(score_RE, chosen, layers, start, list_kept)


def _listed(
    score_RE: Tensor, chosen: Sequence[_Chosen], layers: int, start: int, list_kept: ListKept
) -> tuple[Selection, ...]:
    """The tokens of each part. layers: that the rows belong to. start: the position of the first column."""
    selections: list[Selection] = []
    taken: dict[str, Tensor] = {}  # by the parts before; nothing by none
    for part in chosen:
        # Of a row without such pages: as before.
        last_R1 = (
            torch.where(part.pages_R[:, None] > 0, part.last_R1, taken["taken_last_R1"]) if taken else part.last_R1
        )
        tokens_PN = list_kept(
            score_RE,
            last_R1,
            _offsets(part.pages_R),
            pages=part.pages,
            page_tokens=part.page_tokens,
            first_token=start,
            **taken,
        )
        selections.append(Selection(part.pages_R.view(layers, -1).int(), tokens_PN))
        taken = {"taken_R": part.upto_R, "taken_last_R1": last_R1}
    return tuple(selections)


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


def _gains(score_RE: Tensor, page_size: int, at_once: int, taken_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each page that a row could fill, its best tokens first, the score that it adds and the lowest in it. Each fp32
    [R, J]. taken_R: int64, so many of its best are in other pages; pages for which nothing is left gain -inf."""
    gains, lasts = [], []
    parts = [None] * (-(-len(score_RE) // at_once)) if taken_R is None else taken_R.split(at_once)
    for some_RE, taken in zip(score_RE.split(at_once), parts, strict=True):
        sorted_RE = formulas.sort_down(some_RE)
        tokens, missing = sorted_RE.shape[1], -sorted_RE.shape[1] % page_size
        if taken is None:
            gain_RJ = formulas.page_gains(torch.nn.functional.pad(sorted_RE, (0, missing)), page_size)
            last_RJ = sorted_RE[:, page_size - 1 :: page_size]
            if missing:
                last_RJ = torch.cat([last_RJ, sorted_RE[:, -1:]], dim=1)
        else:
            place_RE = taken[:, None] + torch.arange(tokens + missing, device=taken.device)
            left_RE = sorted_RE.gather(1, place_RE.clamp_max(tokens - 1)).masked_fill_(place_RE >= tokens, 0)
            ends_RJ = place_RE[:, page_size - 1 :: page_size]
            gain_RJ = formulas.page_gains(left_RE, page_size)
            gain_RJ = gain_RJ.masked_fill_(ends_RJ - (page_size - 1) >= tokens, float("-inf"))
            last_RJ = sorted_RE.gather(1, ends_RJ.clamp_max(tokens - 1))
        gains.append(gain_RJ)
        lasts.append(last_RJ.clone())  # a copy: the sorted scores may go
    return torch.cat(gains), torch.cat(lasts)


def _half_by_rank(
    score_RE: Tensor, ranks_HE: Sequence[Tensor | None], counts: Sequence[Tensor], at_once: int
) -> tuple[Tensor, list[Tensor]]:
    """CriticalKV: half of a row's tokens by score, the rest by rank among what is left. counts: int [R], tokens that a
    row keeps in the first part, in the first two, and so on. -> fp32 [R, E], by which to choose all of them, and the
    lowest of it in so many, [R, 1] each."""
    present_HE = [rank_HE for rank_HE in ranks_HE if rank_HE is not None]
    assert len(present_HE) == len(ranks_HE), "some layers have a rank and some have none"
    rank_RE = _rows(present_HE)
    lasts: list[list[Tensor]] = [[] for _ in counts]
    parts = zip(*(count_R.split(at_once) for count_R in counts), strict=True)
    for scores, ranks, some in zip(score_RE.split(at_once), rank_RE.split(at_once), parts, strict=True):
        best = formulas.keep_best(scores, some[-1] // 2)
        if len(counts) == 1:
            ranks.masked_fill_(best, float("inf"))
        else:  # the order within both halves matters as well: of their best tokens' pages
            ranks.copy_(-torch.where(best, _places(scores), _places(ranks) + scores.shape[1]))
        sorted_RE = formulas.sort_down(ranks)
        for last, count_R in zip(lasts, some, strict=True):
            last.append(formulas.last_value(sorted_RE, count_R))
    return rank_RE, [torch.cat(last) for last in lasts]


def _places(score_RE: Tensor) -> Tensor:
    """The place of each token in its row's order, the best first, the lower token first among equals. fp32 [R, E]."""
    order_RE = score_RE.sort(dim=1, descending=True, stable=True).indices
    place_E = torch.arange(score_RE.shape[1], dtype=torch.float32, device=score_RE.device)
    return torch.empty_like(score_RE).scatter_(1, order_RE, place_E.expand_as(score_RE))


def _offsets(pages_R: Tensor) -> Tensor:
    """int [R] pages -> int32 [R + 1], the first page of each row."""
    return torch.nn.functional.pad(pages_R.cumsum(0), (1, 0)).int()

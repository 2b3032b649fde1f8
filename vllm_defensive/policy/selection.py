"""From the scores of all layers to the pages and tokens that stay.

Axes: L layers, H KV heads, E evictable tokens, N tokens a page, J = E/N, P pages kept in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_defensive.policy.budget import guarded
from vllm_defensive.policy.presets import Policy
from vllm_defensive.policy.scoring import LayerScores
from vllm_defensive_kernels import formulas


@dataclass
class Selection:
    """What stays, head after head: (layer 0, head 0), (layer 0, head 1), ..."""

    pages_LH: Tensor
    """int32: pages of each head."""
    tokens_PN: Tensor
    """int32: absolute positions, ascending within each head."""


def select(
    policy: Policy, scores: Sequence[LayerScores], *, page_size: int, packed_blocks: int, evictable: tuple[int, int]
) -> Selection:
    """Choose exactly `packed_blocks` * L * H pages, of `page_size` tokens each, from the range `evictable`.

    Each head gets at least the pages that its forced (+inf) tokens fill, provided `packed_blocks` suffices for them.
    Equal scores: the lowest (layer, head, token) wins. Nothing is read back from the device.
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
    )


def select_within(
    policy: Policy,
    scores: Sequence[LayerScores],
    *,
    page_size: int,
    budget_pages: int,
    guard_pages: int,
    evictable: tuple[int, int],
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

    gains, lasts = [], []
    for chunk_RE in _chunks([layer.scores_HE for layer in scores]):
        sorted_RE = formulas.sort_down(chunk_RE)
        gains.append(formulas.page_gains(sorted_RE, page_size))
        lasts.append(sorted_RE[:, page_size - 1 :: page_size].clone())  # a copy: the sorted scores may go
    gains_RJ, last_RJ = torch.cat(gains), torch.cat(lasts)
    gains_RJ[:, :guard_pages] = float("inf")
    if policy.layer_budget == "even":
        pages_R = formulas.allocate_pages(gains_RJ.view(units, -1, head_pages), budget_pages).flatten()
    else:
        forced_J = gains_RJ[0].isinf()  # the same in all heads
        pages_L = formulas.proportional_pages(_layer_weights(policy, scores), forced_J, budget_pages * layers)
        pages_R = pages_L.repeat_interleave(heads)
    last_R1 = formulas.last_value(last_RJ, pages_R)

    if policy.stages == "half-budget" and scores[0].rank_HE is not None:
        keep_RE = _keep_half_by_rank(scores, pages_R * page_size)
    else:
        keep_RE = _keep_by_score(scores, pages_R * page_size, last_R1)
    total_pages = budget_pages * units
    tokens_X = formulas.packed_positions(keep_RE, pages_R * page_size, total_pages * page_size, start)
    return Selection(pages_R.view(layers, heads).int(), tokens_X.view(total_pages, page_size))


def _layer_weights(policy: Policy, scores: Sequence[LayerScores]) -> Tensor:
    """What each layer's budget is proportional to. fp32 [L]"""
    if policy.layer_budget == "linear":
        return formulas.linear_weights(len(scores), scores[0].scores_HE.device)
    return torch.stack([layer.preference for layer in scores if layer.preference is not None])


def _chunks(layers_HE: Sequence[Tensor]) -> Iterator[Tensor]:
    """The rows of a few layers at a time, fp32 [R, E]. NaN, which only a broken model yields, becomes zero: the
    counts must come out exact, because positions are addresses later."""
    step = max(1, formulas.SORT_ELEMENTS // layers_HE[0].numel())
    for first in range(0, len(layers_HE), step):
        yield torch.cat(list(layers_HE[first : first + step])).nan_to_num_(nan=0.0, posinf=float("inf"))


def _keep_by_score(scores: Sequence[LayerScores], count_R: Tensor, last_R1: Tensor) -> Tensor:
    keep, first = [], 0
    for chunk_RE in _chunks([layer.scores_HE for layer in scores]):
        rows = slice(first, first := first + len(chunk_RE))
        keep.append(formulas.keep_down_to(chunk_RE, count_R[rows], last_R1[rows]))
    return torch.cat(keep)


def _keep_half_by_rank(scores: Sequence[LayerScores], count_R: Tensor) -> Tensor:
    """CriticalKV: half of a head's tokens by score, the rest by rank among what is left."""
    scores_HE = [layer.scores_HE for layer in scores]
    ranks_HE = [layer.rank_HE for layer in scores if layer.rank_HE is not None]
    assert len(ranks_HE) == len(scores_HE), "some layers have a rank and some have none"
    keep, first = [], 0
    for score_RE, rank_RE in zip(_chunks(scores_HE), _chunks(ranks_HE), strict=True):
        rows = slice(first, first := first + len(score_RE))
        certain_RE = formulas.keep_best(score_RE, count_R[rows] // 2)
        rank_RE.masked_fill_(certain_RE, float("inf"))
        keep.append(formulas.keep_best(rank_RE, count_R[rows]))
    return torch.cat(keep)

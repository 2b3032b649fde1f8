"""What a worker knows of a request's packed tokens, and how they are chosen from again, beside those behind them.

A packed page says nothing of where its tokens were in the text, and other heads may have dropped them. So positions and
scores of kept tokens are kept beside the cache, 8 bytes each for each layer and head, of requests that are evicted while
they generate. Their scores last: a token is scored once, when it is chosen from for the first time.

Axes: as in `packing.py`; R = L*H rows, C candidates of a row: its packed tokens, then those of the blocks behind, then
as many empty places as it takes to make all rows equally long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_defensive.packing import Format, Packing, Region
from vllm_defensive.policy import LayerScores, Policy, Selection, select_packed

# Of an empty place: below all scores, and of sums of them, less the more there are.
NOTHING = -1e30


@dataclass(eq=False)
class Kept:
    """Of one request, page by page, as a selection lists them.

    packing: what it was packed into. pages_LH: int32, of each head. position_PN: int32, -1 where there is none.
    score_PN: fp32, by the policy that chooses from them again.
    """

    packing: Packing
    pages_LH: Tensor
    position_PN: Tensor
    score_PN: Tensor


@dataclass(eq=False)
class Candidates:
    """What one request is chosen from. position_RC: int32, -1 for empty places, which come last in a row. score_RC:
    fp32. packed_R, there_R: int64, how many of a row are packed, and how many there are."""

    position_RC: Tensor
    score_RC: Tensor
    packed_R: Tensor
    there_R: Tensor

    @classmethod
    def of(cls, kept: Kept, first: int, score_LHT: Tensor) -> Candidates:
        """kept: what is packed. first: position of the first token behind. score_LHT: of those behind."""
        pages_R, page_tokens = kept.pages_LH.flatten().long(), kept.position_PN.shape[1]
        rows, behind = len(pages_R), score_LHT.shape[2]
        valid_PN = kept.position_PN >= 0
        row_P = torch.arange(rows).repeat_interleave(pages_R)
        packed_R = torch.zeros(rows, dtype=torch.int64).index_add_(0, row_P, valid_PN.sum(dim=1))
        width = int(packed_R.max()) + behind
        position_RC = torch.full((rows, width), -1, dtype=torch.int32)
        score_RC = torch.full((rows, width), NOTHING)
        # Only a head's last page has room left, at its end: a token's place among its head's is its column.
        first_page_R = pages_R.cumsum(0) - pages_R
        place_P = (torch.arange(len(row_P)) - first_page_R[row_P]) * page_tokens
        column_PN = place_P[:, None] + torch.arange(page_tokens)
        at = row_P[:, None].expand_as(column_PN)[valid_PN], column_PN[valid_PN]
        position_RC[at] = kept.position_PN[valid_PN]
        score_RC[at] = kept.score_PN[valid_PN]
        column_RT = packed_R[:, None] + torch.arange(behind)
        position_RC.scatter_(1, column_RT, torch.arange(first, first + behind, dtype=torch.int32).expand(rows, -1))
        score_RC.scatter_(1, column_RT, score_LHT.flatten(0, 1))
        return cls(position_RC, score_RC, packed_R, packed_R + behind)

    def select(self, policy: Policy, format: Format, region: Region, head_pages: int, layers: int) -> Selection:
        """Choose so many pages of each head, on average; the tokens are listed as columns, -1 where there is none."""
        column_C = torch.arange(self.score_RC.shape[1])
        score_RC = self.score_RC
        if policy.sinks:
            above_R1 = score_RC.amax(dim=1, keepdim=True) + 1
            score_RC = torch.where((self.position_RC >= 0) & (self.position_RC < policy.sinks), above_R1, score_RC)
        if policy.keeps_window:
            behind_R1 = self.there_R[:, None]
            in_window_RC = (column_C >= behind_R1 - region.forced_tokens) & (column_C < behind_R1)
            score_RC = score_RC.masked_fill(in_window_RC, float("inf"))
        scores = [LayerScores(score_HC) for score_HC in score_RC.unflatten(0, (layers, -1))]
        (chosen,) = select_packed(
            policy,
            scores,
            format,
            head_pages=head_pages,
            forced_tokens=region.forced_tokens if policy.keeps_window else 0,
            evictable=(0, self.score_RC.shape[1]),
        )
        row_P = torch.arange(len(self.there_R)).repeat_interleave(chosen.pages_LH.flatten().long())
        empty_PN = chosen.tokens_PN >= self.there_R[row_P, None]
        return Selection(chosen.pages_LH, chosen.tokens_PN.masked_fill(empty_PN, -1))

    def kept(self, chosen: Selection, packing: Packing) -> Kept:
        """What is known of the tokens that were chosen, and packed."""
        row_P = torch.arange(len(self.there_R)).repeat_interleave(chosen.pages_LH.flatten().long())
        at = row_P[:, None], chosen.tokens_PN.clamp_min(0).long()
        position_PN = self.position_RC[at].masked_fill_(chosen.tokens_PN < 0, -1)
        return Kept(packing, chosen.pages_LH, position_PN, self.score_RC[at])

    def places(self, chosen: Selection, pages_LH: Tensor, page_tokens: int, behind: int) -> Tensor:
        """Where each chosen token is among its layer's, `[P, N]`: first all packed pages of the layer (`pages_LH`), head
        after head, then all tokens behind, of which each head has as many."""
        layers, heads = pages_LH.shape
        pages_LH = pages_LH.long()
        before_LH = pages_LH.cumsum(1) - pages_LH
        row_P = torch.arange(layers * heads).repeat_interleave(chosen.pages_LH.flatten().long())
        column_PN = chosen.tokens_PN.clamp_min(0).long()
        packed_P1 = self.packed_R[row_P, None]
        packed_PN = before_LH.flatten()[row_P, None] * page_tokens + column_PN
        growth_P1 = pages_LH.sum(1)[row_P // heads, None] * page_tokens + (row_P % heads)[:, None] * behind
        return torch.where(column_PN < packed_P1, packed_PN, growth_P1 + column_PN - packed_P1)

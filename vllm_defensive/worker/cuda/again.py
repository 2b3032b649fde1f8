"""What a GPU worker knows of a request's packed tokens, and how they are chosen from again, beside those behind them.

A packed page says nothing of where its tokens were in the text, and other heads may have dropped them. So positions and
scores of kept tokens stay on the device, 8 bytes each for each layer and head, of requests that are evicted while they
generate. Scores are fp32: some are compared that were made at different times, and must then be the same number.

How many pages a head has is not known here, only how many it may have. So each head has a row of *places*: first those
of as many packed pages as any head may have, then those of the tokens behind, as `compact` takes them. No page has room
left, for a request is packed from whole blocks, and what comes behind are whole blocks, too. So a head has a page or
has it not, and what is read in decode follows from its pages as ever.

Axes: as in `packing.py`; R = L*H rows, J packed pages that a head may have, C places of a row, B tokens behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_defensive.packing import Packing
from vllm_defensive.policy import NOTHING, Policy
from vllm_defensive.worker.cuda import launches
from vllm_defensive_kernels import PackedSource

# Kept tokens that are looked up in one go: what that takes besides is no more than weighing takes (see `memory.py`).
TOKENS_AT_A_TIME = 2**21


@dataclass(frozen=True, eq=False)
class Kept:
    """Of one request, page by page. source: its packed pages. position_PN: int32, of each token; -1 in pages that are
    nobody's. score_PN: fp32, by the policy that chooses from them again."""

    source: PackedSource
    position_PN: Tensor
    score_PN: Tensor

    @classmethod
    def nothing(cls, rows: int, page_tokens: int, device: torch.device) -> Kept:
        """Of a request that is not packed yet: one page, which is nobody's."""
        offset_O = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        position_PN = torch.full((1, page_tokens), -1, dtype=torch.int32, device=device)
        return cls(PackedSource(offset_O[:1], offset_O, 0), position_PN, torch.zeros_like(position_PN).float())

    @property
    def pages_R(self) -> Tensor:
        """int32: pages of each head."""
        return self.source.offset_O.diff()

    @property
    def places(self) -> int:
        """Of a row, those of packed pages."""
        return self.source.most_pages * self.position_PN.shape[1]


@dataclass(frozen=True, eq=False)
class Candidates:
    """What one request is chosen from. first: position of the first token behind. score_RB: fp32, contiguous, of whole
    blocks of tokens behind."""

    kept: Kept
    first: int
    score_RB: Tensor

    def choose(self, policy: Policy, packing: Packing, layers: int) -> tuple[Tensor, Tensor]:
        """(offset_O, place_PN) of what fills the packing's pages: see `launches.choose_again`."""
        score_RC = self._in_places()
        self._lift(score_RC, policy, packing.region.forced_tokens)
        page_tokens = self.kept.position_PN.shape[1]
        pages_R = self.kept.pages_R + self.score_RB.shape[1] // page_tokens
        return launches.choose_again(policy, score_RC, packing, pages_R, layers)

    def _in_places(self) -> Tensor:
        """The scores of each row's places. fp32 `[R, C]`."""
        page_RJ, there_RJ = self._packed_pages(self.kept.source.most_pages)
        score_RJN = self.kept.score_PN[page_RJ].masked_fill_(~there_RJ[..., None], NOTHING)
        return torch.cat([score_RJN.flatten(1), self.score_RB], dim=1)

    def _packed_pages(self, count: int) -> tuple[Tensor, Tensor]:
        """The first pages of each row, int64 `[R, count]`, and whether there are so many; if not, some other page."""
        offset_O = self.kept.source.offset_O.long()
        page_RJ = offset_O[:-1, None] + torch.arange(count, device=offset_O.device)
        return page_RJ.clamp_max(len(self.kept.position_PN) - 1), page_RJ < offset_O[1:, None]

    def _lift(self, score_RC: Tensor, policy: Policy, forced_tokens: int) -> None:
        """What stays whatever its score, in place: the first tokens of the text, and the last candidates."""
        behind, places = self.score_RB.shape[1], self.kept.places
        page_tokens = self.kept.position_PN.shape[1]
        if policy.sinks:
            above_R1 = score_RC.amax(dim=1, keepdim=True) + 1
            # Packed tokens are in the text's order.
            page_RJ, there_RJ = self._packed_pages(min(-(-policy.sinks // page_tokens), self.kept.source.most_pages))
            sink_RJN = (self.kept.position_PN[page_RJ] < policy.sinks) & there_RJ[..., None]
            packed_RX = score_RC[:, : sink_RJN[0].numel()]
            packed_RX.copy_(torch.where(sink_RJN.flatten(1), above_R1, packed_RX))
            score_RC[:, places : places + max(policy.sinks - self.first, 0)] = above_R1
        if policy.keeps_window:
            score_RC[:, places + max(behind - forced_tokens, 0) :] = float("inf")
            if (packed := forced_tokens - behind) > 0:
                back = torch.arange(1, packed + 1, device=score_RC.device)
                place_RX = self.kept.pages_R[:, None].long() * page_tokens - back
                # Of a head that has fewer: a place that is forced already.
                place_RX = torch.where(place_RX >= 0, place_RX, score_RC.shape[1] - 1)
                score_RC.scatter_(1, place_RX, float("inf"))

    def follow(
        self, policy: Policy, packing: Packing, layers: int, offset_O: Tensor, place_PN: Tensor, fresh_K: Tensor
    ) -> Kept:
        """What is known of the tokens that were chosen, and packed into these blocks."""
        rows, pages = len(offset_O) - 1, len(place_PN)
        page_P = torch.arange(pages, dtype=torch.int32, device=offset_O.device)
        row_P = torch.searchsorted(offset_O[1:], page_P, right=True).clamp_max_(rows - 1)
        position_PN = torch.empty_like(place_PN)
        score_PN = torch.empty_like(place_PN, dtype=torch.float32)
        step = max(1, TOKENS_AT_A_TIME // place_PN.shape[1])
        for some in (slice(first, first + step) for first in range(0, pages, step)):
            self._look_up(row_P[some, None], place_PN[some], position_PN[some], score_PN[some])
        had = self.kept.source.most_pages + self.score_RB.shape[1] // place_PN.shape[1]
        most = min(_most_pages(policy, packing, layers, rows), had)
        return Kept(PackedSource(fresh_K, offset_O, most), position_PN, score_PN)

    def _look_up(self, row_P1: Tensor, place_PN: Tensor, position_PN: Tensor, score_PN: Tensor) -> None:
        """Positions and scores of what is in these places, into the last two. row_P1: int64."""
        kept, behind_PN = self.kept, place_PN - self.kept.places
        packed_PN = behind_PN < 0
        flat_PN = kept.source.offset_O[row_P1].long() * place_PN.shape[1] + place_PN
        flat_PN.clamp_(0, kept.position_PN.numel() - 1)
        torch.where(packed_PN, kept.position_PN.flatten()[flat_PN], behind_PN + self.first, out=position_PN)
        position_PN.masked_fill_(place_PN < 0, -1)
        packed_score_PN = kept.score_PN.flatten()[flat_PN]
        if not self.score_RB.numel():
            score_PN.copy_(packed_score_PN)
            return
        flat_PN = (row_P1 * self.score_RB.shape[1] + behind_PN).clamp_(0, self.score_RB.numel() - 1)
        torch.where(packed_PN, packed_score_PN, self.score_RB.flatten()[flat_PN], out=score_PN)


def _most_pages(policy: Policy, packing: Packing, layers: int, rows: int) -> int:
    """Pages that one head may get, at most, of those that it competes for with others."""
    shared = {"head": 1, "layer": rows // layers, "model": rows}[policy.scope]
    return packing.head_pages * (shared if policy.layer_budget == "even" else rows)

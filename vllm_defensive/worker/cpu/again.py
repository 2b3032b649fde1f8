"""What a worker knows of a request's packed tokens, and how they are chosen from again, beside those behind them.

A packed page says nothing of where its tokens were in the text. So positions of kept tokens are kept beside the cache,
of requests that are evicted while they generate, and where a policy's scores last its scores too: 8 bytes a token,
layer and head. Such a token is scored once, when it is chosen from for the first time, and what is behind the packing
is all that is read to score. Other policies look at all that is there once more, with the queries of a later window.

Packed pages of 8-bit keys are read, and what is kept of them is quantised anew among the tokens that then share its
page; a value, quantised by itself, comes out as it went in (docs/quality.md says what that makes of an answer).

Axes: as in `packing.py`; R = L*H rows, C candidates of a row: its packed tokens, then those of the blocks behind, then
as many empty places as it takes to make all rows equally long; n tokens of a packed page, `N` in pages of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vllm_defensive.packing import Format, Packing, Region
from vllm_defensive.plan import Eviction, Score
from vllm_defensive.policy import NOTHING, PRESETS, LayerScores, Policy, Selection, select_packed
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.cpu.runtime import CPURuntime
from vllm_defensive.worker.cpu.tables import Placed
from vllm_defensive.worker.known import Known
from vllm_defensive_kernels.quantised import unpack_pages
from vllm_defensive_kernels.widths import CLASSES

Tokens = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Kept:
    """Of one request, page by page, as a selection lists them.

    blocks: ids of those that it was packed into. page_class: of all their pages. pages_LH: int32, of each head.
    position_Pn: int32, -1 where there is none. score_Pn: fp32, by the policy that chooses from them again.
    """

    blocks: tuple[int, ...]
    page_class: str
    pages_LH: Tensor
    position_Pn: Tensor
    score_Pn: Tensor


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
        pages_R, page_tokens = kept.pages_LH.flatten().long(), kept.position_Pn.shape[1]
        rows, behind = len(pages_R), score_LHT.shape[2]
        valid_Pn = kept.position_Pn >= 0
        row_P = torch.arange(rows).repeat_interleave(pages_R)
        packed_R = torch.zeros(rows, dtype=torch.int64).index_add_(0, row_P, valid_Pn.sum(dim=1))
        width = int(packed_R.max()) + behind
        position_RC = torch.full((rows, width), -1, dtype=torch.int32)
        score_RC = torch.full((rows, width), NOTHING)
        # Only a head's last page has room left, at its end: a token's place among its head's is its column.
        first_page_R = pages_R.cumsum(0) - pages_R
        place_P = (torch.arange(len(row_P)) - first_page_R[row_P]) * page_tokens
        column_Pn = place_P[:, None] + torch.arange(page_tokens)
        at = row_P[:, None].expand_as(column_Pn)[valid_Pn], column_Pn[valid_Pn]
        position_RC[at] = kept.position_Pn[valid_Pn]
        score_RC[at] = kept.score_Pn[valid_Pn]
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
        empty_Pn = chosen.tokens_PN >= self.there_R[row_P, None]
        return Selection(chosen.pages_LH, chosen.tokens_PN.masked_fill(empty_Pn, -1))

    def kept(self, chosen: Selection, packing: Packing) -> Kept:
        """What is known of the tokens that were chosen, and packed."""
        row_P = torch.arange(len(self.there_R)).repeat_interleave(chosen.pages_LH.flatten().long())
        at = row_P[:, None], chosen.tokens_PN.clamp_min(0).long()
        position_Pn = self.position_RC[at].masked_fill_(chosen.tokens_PN < 0, -1)
        return Kept(packing.blocks, _only_class(packing.format), chosen.pages_LH, position_Pn, self.score_RC[at])

    def places(self, chosen: Selection, pages_LH: Tensor, page_tokens: int, behind: int) -> Tensor:
        """Where each chosen token is among its layer's, `[P, n]`, -1 where there is none: first all packed pages of the
        layer (`pages_LH`), head after head, then all tokens behind, of which each head has as many."""
        layers, heads = pages_LH.shape
        pages_LH = pages_LH.long()
        before_LH = pages_LH.cumsum(1) - pages_LH
        row_P = torch.arange(layers * heads).repeat_interleave(chosen.pages_LH.flatten().long())
        column_Pn = chosen.tokens_PN.clamp_min(0).long()
        packed_P1 = self.packed_R[row_P, None]
        packed_Pn = before_LH.flatten()[row_P, None] * page_tokens + column_Pn
        growth_P1 = pages_LH.sum(1)[row_P // heads, None] * page_tokens + (row_P % heads)[:, None] * behind
        place_Pn = torch.where(column_Pn < packed_P1, packed_Pn, growth_P1 + column_Pn - packed_P1)
        return place_Pn.masked_fill_(chosen.tokens_PN < 0, -1)


def _only_class(format: Format) -> str:
    """The class of all pages of a packing that can be chosen from again."""
    (part,) = format.parts
    return part.page_class


class Weigh(Protocol):
    """`CPUEvictor.weigh`."""

    def __call__(
        self,
        policy: Policy,
        layer: int,
        tokens: Tokens,
        *,
        keep_ratio: float,
        evictable: tuple[int, int],
        window: int,
        seen_A: Tensor | None = None,
        first_token: int = 0,
        there_HS: Tensor | None = None,
    ) -> LayerScores: ...


@dataclass(eq=False)
class ScoredAgain:
    """A request whose packed tokens are, or will be, chosen from again, between `score` and `pack`. growth_LHB: int64,
    pages behind what is packed: whole blocks."""

    policy: Policy
    kept: Kept
    growth_LHB: Tensor
    candidates: Candidates


class Repeats:
    """Evictions, on one worker, of requests that were evicted before, or will be again by the same scores."""

    def __init__(self, view: PageView, codec: PageCodec, runtime: CPURuntime, weigh: Weigh, known: Known[Kept]) -> None:
        self._view, self._codec, self._runtime, self._weigh, self._known = view, codec, runtime, weigh, known

    def note(self, eviction: Eviction, parts: tuple[Selection, ...], tokens_of: Callable[[int], Tokens]) -> None:
        """A request was packed that will be evicted again. tokens_of: K and V of a layer's tokens, those of the region
        that was chosen from."""
        assert eviction.score.later is not None
        policy, (chosen,) = PRESETS[eviction.score.later], parts
        score_Pn = torch.zeros(chosen.tokens_PN.shape)
        if policy.lasting:
            start, _ = eviction.region.tokens
            counts = chosen.pages_LH.sum(dim=1).tolist()
            layers = zip(chosen.tokens_PN.split(counts), score_Pn.split(counts), chosen.pages_LH, strict=True)
            for layer, (tokens_Pn, scores_Pn, pages_H) in enumerate(layers):
                found_HE = self._lasting(policy, layer, tokens_of(layer), start, eviction.score.keep)
                head_P = torch.arange(len(found_HE)).repeat_interleave(pages_H.long())
                scores_Pn.copy_(found_HE[head_P[:, None], (tokens_Pn.long() - start).clamp_min(0)])
        packing = eviction.packing
        kept = Kept(packing.blocks, _only_class(packing.format), chosen.pages_LH, chosen.tokens_PN, score_Pn)
        self._known.note(eviction, kept)

    def _lasting(self, policy: Policy, layer: int, tokens: Tokens, first: int, keep: float) -> Tensor:
        """Scores of a layer's tokens, the first of them at position `first`. fp32 `[H, T]`"""
        found = self._weigh(
            replace(policy, sinks=0),  # whose place is up to who chooses
            layer,
            tokens,
            keep_ratio=keep,
            evictable=(0, tokens[0].shape[1]),
            window=0,
            first_token=first,
        )
        return found.scores_HE

    def score(self, score: Score, policy: Policy) -> ScoredAgain:
        """Weigh what a request holds packed, and what is behind that: of the first time all."""
        if score.since is None:
            kept, begin, source = self._nothing(), score.region.shared_blocks, score.source_blocks
            source = source[begin:]
        else:
            kept, begin, source = self._known.of(score.request_id), score.since.full_blocks, score.source_blocks
        first, behind = begin * score.region.block_tokens, score.region.full_blocks - begin
        # With a tail, which is not chosen from; none at all where nothing has come behind what is packed.
        pages_LHB = self._view.of_blocks(torch.tensor(source, dtype=torch.int64))
        growth_LHB = pages_LHB[:, :, : behind * self._view.pages_per_block]
        layers, heads, pages = growth_LHB.shape
        score_LHT = torch.zeros(layers, heads, pages * self._view.page_tokens)
        if policy.lasting:
            for layer, pages_HB in enumerate(growth_LHB if pages else ()):
                score_LHT[layer] = self._lasting(policy, layer, self._read(pages_HB), first, score.keep)
        candidates = Candidates.of(kept, first, score_LHT)
        if not policy.lasting:
            seen_AWQD = self._runtime.windows.pop(score.request_id)
            self._look(score, policy, candidates, kept, pages_LHB, seen_AWQD)
        return ScoredAgain(policy, kept, growth_LHB, candidates)

    def _nothing(self) -> Kept:
        """Of a request that is not packed yet."""
        pages_LH = torch.zeros(self._view.num_layers, self._view.num_kv_heads, dtype=torch.int32)
        position_Pn = torch.empty(0, self._view.page_tokens, dtype=torch.int32)
        return Kept((), "16", pages_LH, position_Pn, position_Pn.float())

    def _look(
        self, score: Score, policy: Policy, candidates: Candidates, kept: Kept, pages_LHB: Tensor, seen_AWQD: Tensor
    ) -> None:
        """Score all candidates by a window, over what each head still has, at the places that it had in the text."""
        assert score.since is not None
        region, page_tokens, packed_tokens = score.region, self._view.page_tokens, kept.position_Pn.shape[1]
        start, first = region.tokens[0], score.since.full_blocks * score.since.block_tokens
        shared = torch.tensor(self._runtime.tables[score.request_id].shared_blocks, dtype=torch.int64)
        shared_LHB, packed = self._view.of_blocks(shared), self._view.of_packed(torch.tensor(kept.blocks))
        sources = packed.split(kept.pages_LH.sum(dim=1).tolist())
        heads = len(kept.pages_LH[0])
        width = candidates.position_RC.shape[1]
        column_C = torch.arange(width)
        for layer, pages_HB in enumerate(pages_LHB):
            rows = slice(layer * heads, (layer + 1) * heads)
            position_HC, packed_H1 = candidates.position_RC[rows].long(), candidates.packed_R[rows, None]
            # Where each position's token is among the layer's: shared ones, packed ones, those behind.
            before, pages_H = start * heads, kept.pages_LH[layer].long()
            first_H1 = (before + (pages_H.cumsum(0) - pages_H) * packed_tokens)[:, None]
            place_HS = torch.full((heads, region.stop + 1), -1)
            place_HS[:, :start] = torch.arange(before).view(heads, start)
            is_packed_HC = column_C < packed_H1
            at_HC = torch.where(is_packed_HC, position_HC, region.stop)  # the last column is nobody's
            place_HS.scatter_(1, at_HC, torch.where(is_packed_HC, first_H1 + column_C, -1))
            behind = before + int(pages_H.sum()) * packed_tokens
            tail_H1 = behind + torch.arange(heads)[:, None] * pages_HB.shape[1] * page_tokens
            place_HS[:, first : region.stop] = tail_H1 + torch.arange(region.stop - first)
            place_HS, there_HS = place_HS[:, : region.stop], place_HS[:, : region.stop] >= 0
            segments = (shared_LHB[layer], "16"), (sources[layer], kept.page_class), (pages_HB, "16")
            key_HSD, value_HSD = (part_XD[place_HS.clamp_min(0)] for part_XD in self._read_flat(*segments))
            found = self._weigh(
                policy,
                layer,
                (key_HSD, value_HSD.masked_fill(~there_HS[..., None], 0)),
                keep_ratio=score.keep,
                evictable=region.tokens,
                window=region.window,
                seen_A=seen_AWQD,
                there_HS=there_HS,
            )
            of_candidate_HC = found.scores_HE.gather(1, (position_HC - start).clamp_min(0))
            candidates.score_RC[rows] = torch.where(position_HC >= 0, of_candidate_HC, NOTHING)

    def pack(self, scored: ScoredAgain, eviction: Eviction) -> tuple[Selection]:
        """Choose pages and tokens, copy them into the packed blocks, and make steps to come find them there."""
        packing, candidates, kept = eviction.packing, scored.candidates, scored.kept
        layers, heads, pages = scored.growth_LHB.shape
        chosen = candidates.select(scored.policy, packing.format, eviction.region, packing.head_pages, layers)
        packed_tokens, behind = kept.position_Pn.shape[1], pages * self._view.page_tokens
        place_Pn = candidates.places(chosen, kept.pages_LH, packed_tokens, behind)
        counts = chosen.pages_LH.sum(dim=1).tolist()
        source = self._view.of_packed(torch.tensor(kept.blocks))
        targets = self._view.of_packed(torch.tensor(packing.blocks))
        for places_Pn, target_P, packed_X, growth_HB in zip(
            place_Pn.split(counts),
            targets.split(counts),
            source.split(kept.pages_LH.sum(dim=1).tolist()),
            scored.growth_LHB,
            strict=True,
        ):
            tokens = self._read_flat((packed_X, kept.page_class), (growth_HB, "16"))
            self._write(tokens, places_Pn, target_P, _only_class(packing.format))
        kept = candidates.kept(chosen, packing)
        self._known.note(eviction, kept)
        row_P = torch.arange(layers * heads).repeat_interleave(chosen.pages_LH.flatten().long())
        tokens_R = torch.zeros(layers * heads, dtype=torch.int64)
        tokens_R.index_add_(0, row_P, (kept.position_Pn >= 0).sum(dim=1))
        self._runtime.place(eviction, Placed(chosen.pages_LH[None], tokens_R.view(1, layers, heads)))
        return (Selection(chosen.pages_LH, kept.position_Pn),)

    def _read(self, pages_HB: Tensor) -> Tokens:
        """K and V of a layer's pages, `[H, T, D]`."""
        key_XD, value_XD = self._read_flat((pages_HB, "16"))
        return key_XD.unflatten(0, (len(pages_HB), -1)), value_XD.unflatten(0, (len(pages_HB), -1))

    def _read_flat(self, *segments: tuple[Tensor, str]) -> Tokens:
        """K and V of any pages, each segment's of one class, token after token, `[X, D]`."""
        found = [self._read_pages(pages_X.flatten(), page_class) for pages_X, page_class in segments]
        key_XD, value_XD = (
            torch.cat([part_PnD.flatten(0, 1) for part_PnD in parts]) for parts in zip(*found, strict=True)
        )
        return key_XD, value_XD

    def _read_pages(self, pages_P: Tensor, page_class: str) -> Tokens:
        data = self._view.data
        if not CLASSES[page_class].quantised:
            return self._codec.read_keys(data, pages_P), self._codec.read_values(data, pages_P)
        page_PY = data.index_select(0, pages_P).view(torch.uint8)
        key_PnD, value_PnD = unpack_pages(page_PY, self._view.page_shape, page_class, channel_major=True)
        return key_PnD.to(data.dtype), value_PnD.to(data.dtype)

    def _write(self, tokens: Tokens, places_Pn: Tensor, target_P: Tensor, page_class: str) -> None:
        """Pack a layer's tokens, those at these places. What is packed in the place of none is never read."""
        if CLASSES[page_class].quantised:
            key_1XD, value_1XD = (part_XD[None].contiguous() for part_XD in tokens)
            assert self._runtime.quantised is not None
            head_P = torch.zeros(len(places_Pn), dtype=torch.int32)
            target_P = target_P.contiguous()
            self._runtime.quantised.pack(key_1XD, value_1XD, places_Pn.int(), head_P, target_P, page_class)
        else:
            key_PND, value_PND = (part_XD[places_Pn] for part_XD in tokens)
            self._view.data.index_copy_(0, target_P, self._codec.pack(key_PND, value_PND))

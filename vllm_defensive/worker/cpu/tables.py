"""Which pages each head of each evicted request reads: built at its eviction, extended when it gets a block.

A row of an evicted request reads three segments, one after the other: the `s` shared positional blocks, the head's
packed pages, class after class, and the positional blocks from `g` on. `Packing.length` tells how many tokens that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_defensive.packing import Packing
from vllm_defensive.worker.cpu.native import class_shape
from vllm_defensive_kernels.pages import PageAddresses
from vllm_defensive_kernels.widths import CLASSES

_SPARE_PAGES = 32  # room for growth in a fresh table, so that it is not reallocated at each new block


class Placed(NamedTuple):
    """Packed pages of each head in each part of a packing's format, int `[C, L, H]`, and the tokens in them; None: as
    many as find room, of those that were chosen from."""

    pages_CLH: Tensor
    tokens_CLH: Tensor | None = None


class RequestTable:
    """Page numbers of one evicted request."""

    def __init__(
        self, addresses: PageAddresses, packing: Packing, shared_blocks: Sequence[int], placed: Placed
    ) -> None:
        """shared_blocks: ids of the leading blocks that stay in place."""
        pages_CLH, tokens_CLH = placed
        self._addresses, self.shared_blocks = addresses, tuple(shared_blocks)
        self.format = packing.format
        self.full_blocks, self.block_tokens = packing.region.full_blocks, packing.region.block_tokens
        self.shared_pages = shared = len(shared_blocks) * addresses.pages_per_block
        self.growth_blocks = 0
        pages_LH = pages_CLH.sum(dim=0)
        self.pages_LHC = pages_CLH.permute(1, 2, 0).to(torch.int32)
        tokens_CLH = _tokens(packing, pages_CLH) if tokens_CLH is None else tokens_CLH
        self.tokens_LHC = tokens_CLH.permute(1, 2, 0).to(torch.int32)
        used_LH = pages_LH.long()
        if not self.format.quantised:
            # A plain row is read page after page: where a head had fewer tokens than find room, what comes next takes
            # the place of its empty pages.
            used_LH = -(-self.tokens_LHC.sum(dim=2) // addresses.page_tokens)
        self._used_LH = used_LH + shared
        self._most_used = int(self._used_LH.max())
        self.offset_LH = packing.length(self.tokens_LHC.sum(dim=2), 0).to(torch.int32)
        columns = int(pages_LH.max()) + shared + _SPARE_PAGES
        self.pages_LHP = torch.zeros(*pages_LH.shape, columns, dtype=torch.int32)
        if shared:
            self.pages_LHP[:, :, :shared] = addresses.of_blocks(torch.tensor(shared_blocks))
        packed = addresses.of_packed(torch.tensor(packing.blocks)).to(torch.int32)
        first_R = torch.full((pages_LH.numel(),), shared)  # a head's first column of a part
        counts_CR = pages_CLH.flatten(1).long()
        for counts, some in zip(counts_CR, packed.split(counts_CR.sum(1).tolist()), strict=True):
            ends = counts.cumsum(0)
            flat = torch.arange(some.numel())
            head = torch.searchsorted(ends, flat, right=True)
            self.pages_LHP.view(counts.numel(), columns)[head, flat + (first_R - ends + counts)[head]] = some
            first_R = first_R + counts

    def grow(self, blocks_B: Tensor) -> tuple[Tensor, Tensor]:
        """Append positional blocks (int64 `[B]`), each of Z pages to every head.

        Returns the (columns int64, pages int32), both `[L, H, B*Z]`, that were written.
        """
        pages_LHB = self._addresses.of_blocks(blocks_B).to(torch.int32)
        count = pages_LHB.shape[2]
        missing = self._most_used + count - self.pages_LHP.shape[2]
        if missing > 0:
            wider = self.pages_LHP.new_zeros(*self.pages_LHP.shape[:2], missing + self.pages_LHP.shape[2] // 2)
            self.pages_LHP = torch.cat([self.pages_LHP, wider], dim=2)
        columns_LHB = self._used_LH[:, :, None] + torch.arange(count)
        self.pages_LHP.scatter_(2, columns_LHB, pages_LHB)
        self._used_LH = self._used_LH + count
        self._most_used += count
        self.growth_blocks += blocks_B.numel()
        return columns_LHB, pages_LHB


def _tokens(packing: Packing, pages_CLH: Tensor) -> Tensor:
    """Tokens that each head has in its pages of each part. int64 `[C, L, H]`. A head's last page may have room left,
    where it keeps every token."""
    first, last = packing.region.tokens
    left_LH = torch.full(pages_CLH.shape[1:], last - first)
    counts = []
    for part, pages_LH in zip(packing.format.parts, pages_CLH.long(), strict=True):
        counts.append(torch.minimum(pages_LH * part.tokens, left_LH))
        left_LH = left_LH - counts[-1]
    return torch.stack(counts)


class BatchTable:
    """The tables of a batch's evicted rows side by side, kept from step to step while the rows stay the same.

    All rows of one head come before those of the next: pages that many rows share are then read one soon after the
    other, and may still be in the core's cache.
    """

    def __init__(self) -> None:
        self._rows: list[RequestTable] = []
        self.pages_LHEP = torch.empty(0)
        self.offset_LHE = torch.empty(0)
        # Of rows whose packing is quantised: pages and tokens of each class, pages that stay in place, and the tokens
        # that are not among the growing ones.
        self.class_pages_LHEC = self.class_tokens_LHEC = self.class_shape_C3 = torch.empty(0)
        self.shared_pages_R = self.full_tokens_R = torch.empty(0)

    def update(self, rows: Sequence[RequestTable], new_blocks: Sequence[Tensor | None]) -> None:
        """Make this the table of `rows`; new_blocks[e]: positional blocks (int64) that row `e` got since, if any."""
        same = len(rows) == len(self._rows) and all(a is b for a, b in zip(rows, self._rows, strict=True))
        for e, (row, blocks) in enumerate(zip(rows, new_blocks, strict=True)):
            if blocks is None:
                continue
            columns_LHB, pages_LHB = row.grow(blocks)
            same = same and row.pages_LHP.shape[2] <= self.pages_LHEP.shape[3]
            if same:
                self.pages_LHEP[:, :, e].scatter_(2, columns_LHB, pages_LHB)
        if same:
            return
        self._rows = list(rows)
        width = max(row.pages_LHP.shape[2] for row in rows)
        layers, heads = rows[0].pages_LHP.shape[:2]
        self.pages_LHEP = torch.zeros(layers, heads, len(rows), width, dtype=torch.int32)
        for e, row in enumerate(rows):
            self.pages_LHEP[:, :, e, : row.pages_LHP.shape[2]] = row.pages_LHP
        self.offset_LHE = torch.stack([row.offset_LH for row in rows], dim=2)
        if rows[0].format.quantised:
            # Of every class that one of them has; the others have none of it.
            found = {(p.page_class, p.tokens) for row in rows for p in row.format.parts}
            classes = sorted(found, key=lambda each: list(CLASSES).index(each[0]))  # in the order of every format
            places = [[classes.index((p.page_class, p.tokens)) for p in row.format.parts] for row in rows]
            self.class_shape_C3 = class_shape(classes)
            self.class_pages_LHEC = torch.zeros(layers, heads, len(rows), len(classes), dtype=torch.int32)
            self.class_tokens_LHEC = torch.zeros_like(self.class_pages_LHEC)
            for e, (row, place) in enumerate(zip(rows, places, strict=True)):
                self.class_pages_LHEC[:, :, e, place] = row.pages_LHC
                self.class_tokens_LHEC[:, :, e, place] = row.tokens_LHC
            full = [row.full_blocks * row.block_tokens for row in rows]
            self.shared_pages_R = torch.tensor([row.shared_pages for row in rows], dtype=torch.int32).repeat(heads)
            self.full_tokens_R = torch.tensor(full, dtype=torch.int32).repeat(heads)

    def lengths(self, seq_lens_E: Tensor) -> Tensor:
        """Tokens that each head reads, int32 `[L, H*E]`, given vLLM's logical lengths int32 `[E]`."""
        return (self.offset_LHE + seq_lens_E).flatten(1)

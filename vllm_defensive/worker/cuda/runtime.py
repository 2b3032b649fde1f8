"""What a CUDA worker knows about evicted requests, and what a step's batch makes of it.

What a request keeps is written into its slot once, on the device, when it is evicted. A step costs the host a look-up a
row and one small copy, row -> slot, so a captured graph finds everything where it was: no table is built, nothing is
read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_defensive.compat import worker as compat
from vllm_defensive.packing import Packing
from vllm_defensive.plan import Eviction, Reconstruction
from vllm_defensive.worker.cuda.launches import EchoRow
from vllm_defensive.worker.reconstruction import Reconstructions
from vllm_defensive.worker.runtime import Runtime
from vllm_defensive.worker.window import Capture, WindowQueries
from vllm_defensive_kernels import DecodeWorkspace, PackedState, PagedKV
from vllm_defensive_kernels.decode import choose_splits

NOBODY = -1  # the slot of a row that was not evicted, or that pads a graph


@dataclass(frozen=True)
class Step:
    """One batch. decode_rows: leading rows with at most one query token each, which our kernel serves, evicted or not.
    packed_runs: among the others, the runs `[first, last)` of evicted rows; the rest of them is stock vLLM's.
    echoes: rows, of either kind, whose queries score the tokens before them."""

    captures: tuple[Capture, ...]
    echoes: tuple[EchoRow, ...]
    decode_rows: int
    packed_runs: tuple[tuple[int, int], ...]


class Placed(NamedTuple):
    """Where an eviction has put each head's pages. offsets: of each part of its format, int32 `[L*H + 1]`, first pages
    of the heads, and how many pages there are, the last of which may be nobody's. fresh_K: int32 ids of the blocks.
    Tensors are on the device."""

    offsets: tuple[tuple[Tensor, int], ...]
    fresh_K: Tensor


class CUDARuntime(Runtime[Placed]):
    """The slots of evicted requests, and what each batch reads of them."""

    def __init__(
        self,
        pages: PagedKV,
        windows: WindowQueries,
        index_of: Mapping[str, int],
        *,
        max_requests: int,
        max_blocks: int,
        num_query_heads: int,
        classes: tuple[str, ...] = ("16",),
    ) -> None:
        """index_of: the model runner's own table, from request id to an index below max_requests: our slot too.
        max_blocks: the most fresh blocks that one request can fill. classes: of the pages that are served."""
        device = pages.key_PND.device
        super().__init__(windows, Reconstructions(pages.num_layers, pages.num_kv_heads, device))
        self.pages = pages
        self.state = PackedState.empty(max_requests, max_blocks, pages.num_layers, pages.num_kv_heads, device, classes)
        self.slot_R = torch.full((max_requests,), NOBODY, dtype=torch.int32, device=device)
        rows, splits = widest_launch(max_requests, num_query_heads, pages.num_kv_heads)
        self.workspace = DecodeWorkspace.empty(rows, num_query_heads, splits, pages.head_size, device)
        self._index_of = index_of
        self._slots: dict[str, int] = {}
        self._slot_of_index = np.full(max_requests, NOBODY, dtype=np.int32)
        self._all_nobody = True  # of slot_R
        self._entering: dict[str, tuple[Eviction, Placed]] = {}  # the model runner gives them a slot first

    def forget(self, request_id: str) -> None:
        super().forget(request_id)
        self._entering.pop(request_id, None)
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._slot_of_index[slot] = NOBODY

    def adopt(self, eviction: Eviction, placed: Placed) -> None:
        """A request enters the batch with what was packed for an earlier one."""
        self._entering[eviction.request_id] = eviction, placed

    def install(self, eviction: Eviction, placed: Placed) -> None:
        """Make an eviction known to the steps that come: its packed pages, its shared blocks, and where its growth
        begins."""
        slot = self._index_of[eviction.request_id]
        self.state.fresh_SK[slot, : placed.fresh_K.shape[0]].copy_(placed.fresh_K)
        self._install_offsets(slot, eviction.packing, placed)
        self.state.shared_S[slot].fill_(eviction.region.shared_blocks)
        self.state.growth_S[slot].fill_(eviction.region.full_blocks)
        self._slots[eviction.request_id] = slot
        self._slot_of_index[slot] = slot

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero the pages of these blocks, whose codes may read as what are no numbers."""
        page_P = self.pages.of_packed(compat.to_device(blocks, self.pages.key_PND.device))
        self.pages.key_PND[page_P] = 0
        self.pages.value_PND[page_P] = 0

    def _install_offsets(self, slot: int, packing: Packing, placed: Placed) -> None:
        """First pages of the heads, class after class; of a class that the request has no pages of they are where the
        next one's begin."""
        rows, first_page = self.pages.num_layers * self.pages.num_kv_heads, 0
        placed_of = {p.page_class: o for p, o in zip(packing.format.parts, placed.offsets, strict=True)}
        for c, name in enumerate(self.state.classes):
            offset_O = self.state.offset_SO[slot, c * rows : (c + 1) * rows + 1]
            if name in placed_of:
                own_O, pages = placed_of[name]
                torch.add(own_O, first_page, out=offset_O)
                first_page += pages
            elif c == 0:
                offset_O.zero_()
            else:  # where the last class's pages end, which only the device knows if some are nobody's
                offset_O[1:] = offset_O[:1]

    def step(self, common: Any) -> Step:
        """What this batch asks for. common: vLLM's `CommonAttentionMetadata`, of which only what the host has is read.
        Afterwards `slot_R` is right for its rows."""
        rows = common.num_reqs
        slots = np.full(rows, NOBODY, dtype=np.int32)
        if self._message is not None:
            self._install_entering()
            known = common.req_idx[:rows]  # rows that pad a graph have no request
            slots[: len(known)] = self._slot_of_index[known]
        self._write_slots(slots)
        starts = common.query_start_loc_cpu.numpy()[: rows + 1]
        longer = np.flatnonzero(np.diff(starts) > 1)
        # vLLM sorts rows by their number of new tokens; one-token rows that came later would simply take the stock path
        decode_rows = int(longer[0]) if len(longer) else rows
        return Step(*self._looks(common, starts), decode_rows, _runs(slots >= 0, decode_rows))

    def _install_entering(self) -> None:
        for eviction, placed in self._entering.values():
            self.install(eviction, placed)
        self._entering.clear()

    def _write_slots(self, slots: np.ndarray) -> None:
        if (slots == NOBODY).all():
            if not self._all_nobody:
                self.slot_R.fill_(NOBODY)
            self._all_nobody = True
        else:
            compat.copy_to_device(slots, self.slot_R[: len(slots)])
            self._all_nobody = False

    def _looks(self, common: Any, starts: np.ndarray) -> tuple[tuple[Capture, ...], tuple[EchoRow, ...]]:
        """What becomes of this step's queries: which are kept, and which score a document."""
        message = self._message
        if message is None or not self.observing:
            return (), ()
        row_of_index = {int(index): row for row, index in enumerate(common.req_idx[: common.num_reqs])}
        wanted = (*message.observe, *message.reconstruct)
        at = {request_id: _place(common, starts, row_of_index[self._index_of[request_id]]) for request_id in wanted}
        captures = (self.windows.plan(r, seen, at[r].chunk, at[r].tokens.start) for r, seen in message.observe.items())
        echoes = (self._echo(part, at[r], common.block_table_tensor) for r, part in message.reconstruct.items())
        return tuple(c for c in captures if c is not None), tuple(echoes)

    def _echo(self, wanted: Reconstruction, place: _Place, table_RB: Tensor) -> EchoRow:
        peak_LHT, table_1B = self.reconstructions.plan(wanted, place.chunk), table_RB[place.row : place.row + 1]
        how = wanted.scored, wanted.normalisation, wanted.sinks
        return EchoRow(place.tokens, place.chunk[0], table_1B, peak_LHT, *how)


class _Place(NamedTuple):
    """Where a request's new tokens are: row, positions `[begin, end)`, and their rows among the batch's tokens."""

    row: int
    chunk: tuple[int, int]
    tokens: slice


def _place(common: Any, starts: np.ndarray, row: int) -> _Place:
    start, stop = int(starts[row]), int(starts[row + 1])
    end = int(common.seq_lens_cpu_upper_bound.numpy()[row])  # exact for prompts: no draft token is among theirs
    return _Place(row, (end - (stop - start), end), slice(start, stop))


def _runs(evicted_R: np.ndarray, first: int) -> tuple[tuple[int, int], ...]:
    """Runs of True from row `first` on, as `[begin, end)`."""
    padded = np.concatenate([[False], evicted_R[first:], [False]])
    edges = (np.flatnonzero(padded[1:] != padded[:-1]) + first).tolist()
    return tuple(pairwise(edges))[::2]


def widest_launch(max_rows: int, num_query_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """(rows, splits) of the decode launch, of one token a row, that has the most partial results."""
    group = num_query_heads // num_kv_heads
    launches = ((rows, choose_splits(rows, group, num_kv_heads, 1)) for rows in range(1, max_rows + 1))
    return max(launches, key=lambda launch: launch[0] * launch[1])

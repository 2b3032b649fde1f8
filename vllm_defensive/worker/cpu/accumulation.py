"""The attention that each prompt token gets from all queries of its prompt, summed while the chunks pass.

Costs 4 bytes for each layer, KV head and token of the prompt, from its first chunk to its eviction, and a second look
at the chunk's attention; requests of other policies pay nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.softmax import Softmax
from vllm_defensive.worker.window import IncompleteError
from vllm_defensive_kernels.formulas import accumulate_attention


@dataclass(frozen=True)
class Accumulation:
    """One row of a batch: its queries are rows `tokens` of the batch, its keys lie in `pages_LHB` (int64), and the last
    query sees `end` of them. seen_A: of each reader, the queries that are in `mass_AHT` already."""

    mass_AHT: Tensor
    seen_A: list[int]
    pages_LHB: Tensor
    tokens: slice
    end: int

    @property
    def begin(self) -> int:
        return self.end - (self.tokens.stop - self.tokens.start)


class Accumulations:
    """Sums fp32 `[A, H, T]` of the requests that are being prefilled, one for each reader.

    A reader knows how many queries it has summed, and takes a chunk only where that one begins: a step that is planned
    twice, as for two metadata builders, adds once, and sums with a gap are never complete.
    """

    def __init__(self, view: PageView, codec: PageCodec, softmax_A: Sequence[Softmax], readers: Readers) -> None:
        self._view, self._codec, self._softmax_A, self._readers = view, codec, softmax_A, readers
        self._masses: dict[str, Tensor] = {}
        self._seen: dict[str, list[int]] = {}

    def plan(
        self, request_id: str, stop: int, chunk: tuple[int, int], row_start: int, blocks_B: Tensor
    ) -> Accumulation | None:
        """For one row of a batch: token positions `chunk` of a prompt that is evicted at `stop`, at batch row
        `row_start`; None if its beginning was not seen. blocks_B: the blocks that hold its tokens, any integers."""
        begin, end = chunk
        if begin == 0 and self._seen.get(request_id, [-1])[0] not in (0, end):
            self._masses[request_id] = torch.zeros(len(self._readers), self._view.num_kv_heads, stop)
            self._seen[request_id] = [0] * len(self._readers)
        if request_id not in self._masses or end > stop:
            return None
        blocks = -(-end // self._view.block_tokens)
        pages_LHB = self._view.of_blocks(blocks_B[:blocks].long())
        tokens = slice(row_start, row_start + end - begin)
        return Accumulation(self._masses[request_id], self._seen[request_id], pages_LHB, tokens, end)

    def add(self, part: Accumulation, reader: int, query_TQD: Tensor) -> None:
        """Sum one reader's share, once its keys are in the cache."""
        if part.seen_A[reader] != part.begin:
            return
        pages_HB = part.pages_LHB[self._readers.caches[reader]]
        key_PND = self._codec.read_keys(self._view.data, pages_HB.flatten())
        key_HSD = key_PND.reshape(pages_HB.shape[0], -1, key_PND.shape[2])[:, : part.end]
        mass_HS, softmax = part.mass_AHT[reader, :, : part.end], self._softmax_A[reader]
        accumulate_attention(mass_HS, query_TQD[part.tokens], key_HSD, **softmax.arguments)
        part.seen_A[reader] = part.end

    def pop(self, request_id: str) -> Tensor:
        """The complete sums `[A, H, T]`. Raises IncompleteError if some queries were not seen."""
        complete, seen = self._complete(request_id), min(self._seen.pop(request_id, [0]))
        mass_AHT = self._masses.pop(request_id, None)
        if mass_AHT is None or not complete:
            raise IncompleteError(f"of its prompt's queries {seen} were seen")
        return mass_AHT

    def drop_complete(self) -> None:
        """Forget sums that no eviction took: the scheduler found nothing to gain when the request got there."""
        for request_id in [r for r in self._seen if self._complete(r)]:
            self.drop(request_id)

    def _complete(self, request_id: str) -> bool:
        return request_id in self._seen and min(self._seen[request_id]) == self._masses[request_id].shape[2]

    def drop(self, request_id: str) -> None:
        """Forget a request that ended, was preempted or starts anew."""
        self._masses.pop(request_id, None)
        self._seen.pop(request_id, None)

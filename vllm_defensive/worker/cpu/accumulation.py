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
from vllm_defensive.worker.window import IncompleteError
from vllm_defensive_kernels.formulas import accumulate_attention


@dataclass(frozen=True)
class Accumulation:
    """One row of a batch: its queries are rows `tokens` of the batch, its keys lie in `pages_LHB` (int64), and the last
    query sees `end` of them. seen_L: of each layer, the queries that are in `mass_LHT` already."""

    mass_LHT: Tensor
    seen_L: list[int]
    pages_LHB: Tensor
    tokens: slice
    end: int

    @property
    def begin(self) -> int:
        return self.end - (self.tokens.stop - self.tokens.start)


class Accumulations:
    """Sums fp32 `[L, H, T]` of the requests that are being prefilled.

    A layer knows how many queries it has summed, and takes a chunk only where that one begins: a step that is planned
    twice, as for two metadata builders, adds once, and sums with a gap are never complete.
    """

    def __init__(self, view: PageView, codec: PageCodec, scales: Sequence[float]) -> None:
        """scales: of the attention logits, one a layer."""
        self._view, self._codec, self._scales = view, codec, scales
        self._masses: dict[str, Tensor] = {}
        self._seen: dict[str, list[int]] = {}

    def plan(
        self, request_id: str, stop: int, chunk: tuple[int, int], row_start: int, blocks_B: Tensor
    ) -> Accumulation | None:
        """For one row of a batch: token positions `chunk` of a prompt that is evicted at `stop`, at batch row
        `row_start`; None if its beginning was not seen. blocks_B: the blocks that hold its tokens, any integers."""
        begin, end = chunk
        if begin == 0 and self._seen.get(request_id, [-1])[0] not in (0, end):
            self._masses[request_id] = torch.zeros(self._view.num_layers, self._view.num_kv_heads, stop)
            self._seen[request_id] = [0] * self._view.num_layers
        if request_id not in self._masses or end > stop:
            return None
        blocks = -(-end // self._view.block_tokens)
        pages_LHB = self._view.of_blocks(blocks_B[:blocks].long())
        tokens = slice(row_start, row_start + end - begin)
        return Accumulation(self._masses[request_id], self._seen[request_id], pages_LHB, tokens, end)

    def add(self, part: Accumulation, layer: int, query_TQD: Tensor) -> None:
        """Sum one layer's share, once its keys are in the cache."""
        if part.seen_L[layer] != part.begin:
            return
        pages_HB = part.pages_LHB[layer]
        key_PND = self._codec.read_keys(self._view.data, pages_HB.flatten())
        key_HSD = key_PND.reshape(pages_HB.shape[0], -1, key_PND.shape[2])[:, : part.end]
        accumulate_attention(part.mass_LHT[layer, :, : part.end], query_TQD[part.tokens], key_HSD, self._scales[layer])
        part.seen_L[layer] = part.end

    def pop(self, request_id: str) -> Tensor:
        """The complete sums `[L, H, T]`. Raises IncompleteError if some queries were not seen."""
        complete, seen = self._complete(request_id), min(self._seen.pop(request_id, [0]))
        mass_LHT = self._masses.pop(request_id, None)
        if mass_LHT is None or not complete:
            raise IncompleteError(f"of its prompt's queries {seen} were seen")
        return mass_LHT

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

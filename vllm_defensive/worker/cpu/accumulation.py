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
    query sees `seen` of them."""

    mass_LHT: Tensor
    pages_LHB: Tensor
    tokens: slice
    seen: int


class Accumulations:
    """Sums fp32 `[L, H, T]` of the requests that are being prefilled."""

    def __init__(self, view: PageView, codec: PageCodec, scales: Sequence[float]) -> None:
        """scales: of the attention logits, one a layer."""
        self._view, self._codec, self._scales = view, codec, scales
        self._masses: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}

    def plan(
        self, request_id: str, stop: int, chunk: tuple[int, int], row_start: int, blocks_B: Tensor
    ) -> Accumulation:
        """For one row of a batch: token positions `chunk` of a prompt that is evicted at `stop`, at batch row
        `row_start`. blocks_B: the blocks that hold its tokens, any integers."""
        begin, end = chunk
        assert end <= stop, f"{request_id}: a chunk ends at {end}, beyond its eviction at {stop}"
        if begin == 0:
            shape = (self._view.num_layers, self._view.num_kv_heads, stop)
            self._masses[request_id] = torch.zeros(shape)
            self._seen[request_id] = 0
        seen = self._seen.get(request_id)
        assert seen == begin, f"{request_id}: a chunk begins at {begin}, and {seen} queries were seen"
        self._seen[request_id] = end
        blocks = -(-end // self._view.page_tokens)
        pages_LHB = self._view.of_blocks(blocks_B[:blocks].long())
        return Accumulation(self._masses[request_id], pages_LHB, slice(row_start, row_start + end - begin), end)

    def add(self, part: Accumulation, layer: int, query_TQD: Tensor) -> None:
        """Sum one layer's share, once its keys are in the cache."""
        pages_HB = part.pages_LHB[layer]
        key_PND = self._codec.read_keys(self._view.data, pages_HB.flatten())
        key_HSD = key_PND.reshape(pages_HB.shape[0], -1, key_PND.shape[2])[:, : part.seen]
        accumulate_attention(part.mass_LHT[layer, :, : part.seen], query_TQD[part.tokens], key_HSD, self._scales[layer])

    def pop(self, request_id: str) -> Tensor:
        """The complete sums `[L, H, T]`. Raises IncompleteError if some queries were not seen."""
        mass_LHT, seen = self._masses.pop(request_id, None), self._seen.pop(request_id, 0)
        if mass_LHT is None or seen != mass_LHT.shape[2]:
            raise IncompleteError(f"of its prompt's queries {seen} were seen")
        return mass_LHT

    def drop_complete(self) -> None:
        """Forget sums that no eviction took: the scheduler found nothing to gain when the request got there."""
        for request_id in [r for r, seen in self._seen.items() if seen == self._masses[r].shape[2]]:
            self.drop(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a request that ended, was preempted or starts anew."""
        self._masses.pop(request_id, None)
        self._seen.pop(request_id, None)

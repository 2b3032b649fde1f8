"""The largest attention that the queries of an echo pay each token of the request which it repeats.

Costs 4 bytes for each layer, KV head and token of the request, from its first echo to its eviction, and a second look
at an echo's attention; other requests pay nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_defensive.packing import Region
from vllm_defensive.plan import Reconstruction
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.window import IncompleteError
from vllm_defensive_kernels.echo import reconstruct_attention


@dataclass(eq=False)
class _Seen:
    """Of one request. peak_LHT: fp32, the largest attention so far. ends: part -> of each layer, up to which position
    an echo's queries have passed. whole: parts whose last query has passed."""

    peak_LHT: Tensor
    ends: dict[tuple[int, int], list[int]]
    whole: set[tuple[int, int]]


@dataclass(frozen=True)
class EchoRow:
    """One row of a batch: its queries are rows `tokens` of the batch, the first of them at position `begin`; its keys
    lie in `pages_LHB` (int64)."""

    wanted: Reconstruction
    seen: _Seen
    pages_LHB: Tensor
    tokens: slice
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.tokens.stop - self.tokens.start


class Reconstructions:
    """Peaks of the requests that are being repeated.

    A layer takes queries only where the last ones ended, or where an echo begins, so that a part with a gap is never
    whole. To see queries twice changes nothing.
    """

    def __init__(self, view: PageView, codec: PageCodec, scales: Sequence[float]) -> None:
        """scales: of the attention logits, one a layer."""
        self._view, self._codec, self._scales = view, codec, scales
        self._seen: dict[str, _Seen] = {}

    def plan(self, wanted: Reconstruction, chunk: tuple[int, int], row_start: int, blocks_B: Tensor) -> EchoRow:
        """For one row of a batch: positions `chunk` of an echo, at batch row `row_start`. blocks_B: the blocks that
        hold its tokens, any integers."""
        begin, end = chunk
        if wanted.request_id not in self._seen:
            peak_LHT = torch.zeros(self._view.num_layers, self._view.num_kv_heads, wanted.stop)
            self._seen[wanted.request_id] = _Seen(peak_LHT, {}, set())
        blocks = -(-end // self._view.block_tokens)
        pages_LHB = self._view.of_blocks(blocks_B[:blocks].long())
        return EchoRow(
            wanted, self._seen[wanted.request_id], pages_LHB, slice(row_start, row_start + end - begin), begin
        )

    def add(self, row: EchoRow, layer: int, query_TQD: Tensor) -> None:
        """Take one layer's share, once its keys are in the cache."""
        wanted, seen = row.wanted, row.seen
        ends = seen.ends.setdefault(wanted.part, [-1] * self._view.num_layers)
        if row.begin not in (wanted.stop, ends[layer]):
            return
        pages_HB = row.pages_LHB[layer]
        key_PND = self._codec.read_keys(self._view.data, pages_HB.flatten())
        key_HXD = key_PND.reshape(pages_HB.shape[0], -1, key_PND.shape[2])[:, : row.end]
        reconstruct_attention(
            seen.peak_LHT[layer],
            query_TQD[row.tokens],
            key_HXD,
            self._scales[layer],
            scored=wanted.scored,
            first=row.begin,
            normalised=wanted.normalisation,
            sink=wanted.sinks,
        )
        ends[layer] = row.end
        if min(ends) == wanted.end:
            seen.whole.add(wanted.part)

    def pop(self, request_id: str, region: Region) -> Tensor:
        """The complete peaks `[L, H, T]`. Raises IncompleteError if some of the region was not repeated."""
        seen = self._seen.pop(request_id, None)
        repeated = 0 if seen is None else sum(stop - first for first, stop in seen.whole)
        if seen is None or repeated != region.stop - region.tokens[0]:
            raise IncompleteError(f"of its prompt {repeated} tokens were repeated")
        return seen.peak_LHT

    def drop(self, request_id: str) -> None:
        """Forget a request that ended, was preempted or starts anew."""
        self._seen.pop(request_id, None)

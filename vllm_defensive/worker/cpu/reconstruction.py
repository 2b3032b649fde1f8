"""What an echo's queries pay the tokens that it repeats, read from the CPU's pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_defensive.plan import Reconstruction
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.reconstruction import Reconstructions
from vllm_defensive.worker.softmax import Softmax
from vllm_defensive_kernels.echo import reconstruct_attention


@dataclass(frozen=True)
class EchoRow:
    """One row of a batch: its queries are rows `tokens` of the batch, the first of them at position `begin`; its keys
    lie in `pages_LHB` (int64). peak_LHT: fp32, what they raise."""

    wanted: Reconstruction
    peak_LHT: Tensor
    pages_LHB: Tensor
    tokens: slice
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.tokens.stop - self.tokens.start


class CPUReconstructions(Reconstructions):
    """The same, with the pages that the keys are read from."""

    def __init__(self, view: PageView, codec: PageCodec, softmax_A: Sequence[Softmax], readers: Readers) -> None:
        super().__init__(view.num_layers, view.num_kv_heads)
        self._view, self._codec, self._softmax_A, self._readers = view, codec, softmax_A, readers

    def row(self, wanted: Reconstruction, chunk: tuple[int, int], row_start: int, blocks_B: Tensor) -> EchoRow:
        """For one row of a batch: positions `chunk` of an echo, at batch row `row_start`. blocks_B: the blocks that
        hold its tokens, any integers."""
        begin, end = chunk
        blocks = -(-end // self._view.block_tokens)
        pages_LHB = self._view.of_blocks(blocks_B[:blocks].long())
        tokens = slice(row_start, row_start + end - begin)
        return EchoRow(wanted, self.plan(wanted, chunk), pages_LHB, tokens, begin)

    def add(self, row: EchoRow, reader: int, query_TQD: Tensor) -> None:
        """Take one reader's share, once its keys are in the cache."""
        layer = self._readers.caches[reader]
        wanted, pages_HB = row.wanted, row.pages_LHB[layer]
        key_PND = self._codec.read_keys(self._view.data, pages_HB.flatten())
        key_HXD = key_PND.reshape(pages_HB.shape[0], -1, key_PND.shape[2])[:, : row.end]
        reconstruct_attention(
            row.peak_LHT[layer],
            query_TQD[row.tokens],
            key_HXD,
            scored=wanted.scored,
            first=row.begin,
            normalised=wanted.normalisation,
            sink=wanted.sinks,
            **self._softmax_A[reader].arguments,
        )

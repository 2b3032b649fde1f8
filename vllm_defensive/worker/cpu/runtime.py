"""What a worker knows about evicted requests, and what a step's batch makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_defensive.plan import Eviction
from vllm_defensive.worker.cpu.accumulation import Accumulation, Accumulations
from vllm_defensive.worker.cpu.native import ClassRows, Quantised
from vllm_defensive.worker.cpu.pages import PageView
from vllm_defensive.worker.cpu.reconstruction import CPUReconstructions, EchoRow
from vllm_defensive.worker.cpu.tables import BatchTable, Placed, RequestTable
from vllm_defensive.worker.runtime import Runtime
from vllm_defensive.worker.window import Capture, WindowQueries

_NO_LENGTHS = torch.empty(0, dtype=torch.int32)


class PlainRows(NamedTuple):
    """Sequences of one KV head each in one layer: first query token of each, and how many there are, int32 `[R + 1]`;
    tokens, int32 `[R]`; pages, int32 `[R, P]`."""

    query_start_R1: Tensor
    seq_lens_R: Tensor
    table_RP: Tensor


@dataclass(frozen=True)
class EvictedRows:
    """Evicted rows of one batch, all quantised or none. R = H*E sequences of one KV head each, all rows of a head
    together; X = their query tokens in all.

    rows_E int64 and query_lens_E int32: batch rows and their numbers of new tokens. token_head_X int64: index of each
    (token, KV head) into the batch's queries seen as `[T*H, G, D]`; None when that is all of them in their order: in a
    decode step of one row, and where all rows were evicted and there is one KV head. query_start_R int32 `[R+1]`.
    tables_LRP and, of plain rows, seq_lens_LR int32, per layer. quantised: of quantised rows, what the compiled
    function takes; else None.
    """

    rows_E: Tensor
    query_lens_E: Tensor
    token_head_X: Tensor | None
    query_start_R: Tensor
    tables_LRP: Tensor
    seq_lens_LR: Tensor
    quantised: ClassRows | None = None

    def plain(self, layer: int, head: int | None = None) -> PlainRows:
        """The sequences of a layer, or of one of its heads alone."""
        rows = PlainRows(self.query_start_R, self.seq_lens_LR[layer], self.tables_LRP[layer])
        if head is None:
            return rows
        # Every head has the same queries, and the first one's begin at 0.
        count = self.rows_E.numel()
        some = slice(head * count, (head + 1) * count)
        return PlainRows(rows.query_start_R1[: count + 1], rows.seq_lens_R[some], rows.table_RP[some])


@dataclass(frozen=True)
class Step:
    captures: tuple[Capture, ...]
    accumulations: tuple[Accumulation, ...]
    echoes: tuple[EchoRow, ...]
    evicted: tuple[EvictedRows, ...]


class CPURuntime(Runtime[Placed]):
    """The tables of evicted requests, and what each batch reads of them."""

    reconstructions: CPUReconstructions

    def __init__(
        self,
        view: PageView,
        windows: WindowQueries,
        accumulations: Accumulations,
        reconstructions: CPUReconstructions,
        request_ids: Callable[[Any], Sequence[str]],
    ) -> None:
        """request_ids: from vLLM's common attention metadata to the request id of each batch row."""
        super().__init__(windows, reconstructions)
        self.attention_view = view.attention_view()
        self.quantised: Quantised | None = None  # set by the worker, where its functions could be compiled
        self.accumulations = accumulations
        self.tables: dict[str, RequestTable] = {}
        self._view = view
        self._request_ids = request_ids
        self._plain, self._quantised = BatchTable(), BatchTable()

    def forget(self, request_id: str) -> None:
        super().forget(request_id)
        self.tables.pop(request_id, None)
        self.accumulations.drop(request_id)

    def install(self, eviction: Eviction, placed: Placed) -> None:
        """Make an eviction known to the steps that come."""
        if eviction.score.since is None:
            shared = eviction.score.source_blocks[: eviction.region.shared_blocks]
        else:
            shared = self.tables[eviction.request_id].shared_blocks
        self.tables[eviction.request_id] = RequestTable(self._view, eviction.packing, shared, placed)

    def clear(self, blocks: Sequence[int]) -> None:
        self._view.data.index_fill_(0, self._view.of_packed(torch.tensor(blocks)), 0)

    def drop_untaken(self) -> None:
        super().drop_untaken()
        self.accumulations.drop_complete()

    def step(self, common: Any) -> Step | None:
        """What is special about this batch, or None: nothing is. common: vLLM's `CommonAttentionMetadata`."""
        message = self._message
        if message is None or not (self.tables or message.observe or message.accumulate or message.reconstruct):
            return None
        ids = self._request_ids(common)
        rows = [row for row, request_id in enumerate(ids) if request_id in self.tables]
        captures = self._captures(ids, common) if message.observe else ()
        accumulations = self._accumulations(ids, common) if message.accumulate else ()
        echoes = self._echoes(ids, common) if message.reconstruct else ()
        if not rows and not captures and not accumulations and not echoes:
            return None
        quantised = [row for row in rows if self.tables[ids[row]].format.quantised]
        plain = [row for row in rows if not self.tables[ids[row]].format.quantised]
        parts = ((plain, self._plain), (quantised, self._quantised))
        evicted = tuple(self._evicted(ids, some, batch, common) for some, batch in parts if some)
        return Step(captures, accumulations, echoes, evicted)

    def _captures(self, ids: Sequence[str], common: Any) -> tuple[Capture, ...]:
        assert self._message is not None
        captures = []
        for row, request_id in enumerate(ids):
            observed = self._message.observe.get(request_id)
            if observed is None:
                continue
            chunk, start = _chunk(common, row)
            captures.append(self.windows.plan(request_id, observed, chunk, start))
        return tuple(c for c in captures if c is not None)

    def _accumulations(self, ids: Sequence[str], common: Any) -> tuple[Accumulation, ...]:
        assert self._message is not None
        wanted = self._message.accumulate
        parts = (
            self.accumulations.plan(request_id, wanted[request_id], *_chunk(common, row), self._blocks(common, row))
            for row, request_id in enumerate(ids)
            if request_id in wanted
        )
        return tuple(part for part in parts if part is not None)

    def _echoes(self, ids: Sequence[str], common: Any) -> tuple[EchoRow, ...]:
        assert self._message is not None
        wanted = self._message.reconstruct
        return tuple(
            self.reconstructions.row(wanted[request_id], *_chunk(common, row), self._blocks(common, row))
            for row, request_id in enumerate(ids)
            if request_id in wanted
        )

    def _evicted(self, ids: Sequence[str], rows: list[int], batch: BatchTable, common: Any) -> EvictedRows:
        tables = [self.tables[ids[row]] for row in rows]
        rows_E = torch.tensor(rows)
        seq_lens_E = common.seq_lens[rows_E]
        block_tokens = self._view.block_tokens
        new_blocks: list[Tensor | None] = []
        for row, table, seq_len in zip(rows, tables, seq_lens_E.tolist(), strict=True):
            first, last = table.full_blocks + table.growth_blocks, -(-seq_len // block_tokens)
            new_blocks.append(self._blocks(common, row, first, last).long() if last > first else None)
        batch.update(tables, new_blocks)

        query_lens_E, token_head_X, query_start_R = self._queries(rows, common)
        return EvictedRows(
            rows_E=rows_E,
            query_lens_E=query_lens_E,
            token_head_X=token_head_X,
            query_start_R=query_start_R,
            tables_LRP=batch.pages_LHEP.flatten(1, 2),
            seq_lens_LR=batch.lengths(seq_lens_E) if batch is self._plain else _NO_LENGTHS,
            quantised=self._class_rows(seq_lens_E, query_start_R) if batch is self._quantised else None,
        )

    def _blocks(self, common: Any, row: int, first: int = 0, last: int | None = None) -> Tensor:
        """Ids of a row's blocks, of which the step's table has the parts."""
        parts = self._view.pages_per_block
        end = None if last is None else last * parts
        return common.block_table_tensor[row, first * parts : end : parts] // parts

    def _class_rows(self, seq_lens_E: Tensor, query_start_R: Tensor) -> ClassRows:
        batch = self._quantised
        return ClassRows(
            query_start_R,
            batch.pages_LHEP.flatten(1, 2),
            batch.shared_pages_R,
            seq_lens_E.int().repeat(self._view.num_kv_heads) - batch.full_tokens_R,
            batch.class_pages_LHEC.flatten(1, 2),
            batch.class_tokens_LHEC.flatten(1, 2),
            batch.class_shape_C3,
        )

    def _queries(self, rows: list[int], common: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """(query_lens_E, token_head_X, query_start_R) of `EvictedRows`."""
        num_heads, every_row = self._view.num_kv_heads, len(rows) == common.num_reqs
        if every_row and common.num_actual_tokens == len(rows):  # of one token, as in most steps
            query_lens_E = torch.ones(len(rows), dtype=torch.int32)
            query_start_R = torch.arange(num_heads * len(rows) + 1, dtype=torch.int32)
            token_Y = torch.arange(len(rows))
        else:
            rows_E = torch.tensor(rows)
            starts_E = common.query_start_loc_cpu[rows_E]
            query_lens_E = common.query_start_loc_cpu[rows_E + 1] - starts_E
            ends_E = query_lens_E.cumsum(0)
            query_start_R = torch.zeros(num_heads * len(rows) + 1, dtype=torch.int32)
            query_start_R[1:] = query_lens_E.repeat(num_heads).cumsum(0)
            # Token y of the evicted rows lies in the batch where its row starts, plus its place in the row.
            token_Y = torch.arange(int(ends_E[-1])) + (starts_E - ends_E + query_lens_E).repeat_interleave(query_lens_E)
        in_order = every_row and (num_heads == 1 or common.num_actual_tokens == 1)
        token_head_X = None if in_order else (token_Y * num_heads + torch.arange(num_heads)[:, None]).flatten()
        return query_lens_E, token_head_X, query_start_R


def _chunk(common: Any, row: int) -> tuple[tuple[int, int], int]:
    """(positions `[begin, end)` of a row's new tokens, where they start in the batch)."""
    start, stop = common.query_start_loc_cpu[row : row + 2].tolist()
    end = int(common.seq_lens[row])
    return (end - (stop - start), end), start

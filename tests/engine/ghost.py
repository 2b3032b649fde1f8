"""A worker without a model: what every block would hold, tracked as numbers, and checked at each read.

A slot holds one int64 that stands for a key and value: the hash of all tokens up to it, if it was computed from the
full context, or that hash mixed with the eviction it was computed under. So a block that is reused too early, written
while somebody else reads it, or taken from the prefix cache although it was computed from an evicted context shows up
as a wrong number in some later read. Of draft tokens, the slots from the first wrong one on hold nothing of use, and
must be written again before they are read. Blocks that held codes are nobody's to write tokens into before the message
has said that they are to be cleared.

A block of a recurrent layer holds one such number, of the last token that its state has seen: a state that was taken
from elsewhere than where the request goes on, or from under another's eviction, shows up in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_defensive.compat import channels
from vllm_defensive.plan import Eviction, Reconstruction
from vllm_defensive.policy import PRESETS

_EVICTED = 0x5BD1E995  # mixed into what is computed from an evicted context
_REJECTED = 0x3C6EF372  # what the slots of wrong drafts hold


@dataclass
class _Row:
    """What the worker knows of one request."""

    table: list[int] = field(default_factory=list)
    states: list[list[int]] = field(default_factory=list)
    """Of each group of recurrent layers, its table."""
    end: int = 0
    """Tokens that it has computed."""
    window: tuple[int, int] = (0, 0)
    seen_window: set[int] = field(default_factory=set)
    accumulated: int = 0
    repeated: dict[tuple[int, int], int] = field(default_factory=dict)
    """Part of it -> the position up to which an echo of that part has come; -1 once it was at its end."""
    eviction: Eviction | None = None
    stamps: list[tuple[int, int]] = field(default_factory=list)
    """Of each eviction, the position from which tokens were computed under it, and the number that marks it."""

    @property
    def stamp(self) -> int:
        return self.stamps[-1][1]


class GhostWorker:
    """tokens_of: request id -> all token ids of the request that exist or will ever be drawn. states: tokens of a block
    of each group of recurrent layers."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        window: int,
        tokens_of: dict[str, list[int]],
        states: Sequence[int] = (),
    ) -> None:
        self.memory = np.zeros((num_blocks, block_size), dtype=np.int64)
        self._states = states
        self.evictions: list[Eviction] = []
        self.adoptions: list[Eviction] = []
        self.declines: set[str] = set()
        """Requests whose evictions this worker does not carry out."""
        self.cancelled: dict[str, str] = {}
        """Of the last step: what a worker would report."""
        self._block_size, self._window, self._tokens_of = block_size, window, tokens_of
        self._rows: dict[str, _Row] = {}
        self._exact: dict[str, np.ndarray] = {}
        self._stamp = 0
        self._kept: dict[int, tuple[Eviction, int]] = {}
        self._held: set[str] = set()
        self._coded: set[int] = set()

    def execute(self, output: Any, rejected: Mapping[str, int]) -> None:
        """One step: update tables as vLLM's runner does, read, write, then evict. rejected: of each request's tokens in
        this step, how many of the last are wrong drafts."""
        message = channels.read_message(output)
        for request_id in (*channels.reset_requests(output), *message.released):
            self._held.discard(request_id)
        for request_id in channels.reset_requests(output):
            self._rows.pop(request_id, None)
        computed = self._update_tables(output)
        self._coded.difference_update(message.clear)
        for number in message.forgotten:
            self._kept.pop(number, None)
        for eviction in message.adopted:
            row = self._rows[eviction.request_id]
            made, stamp = self._kept[eviction.number]
            row.stamps = [(eviction.region.stop, stamp)]
            assert made.packing == eviction.packing and computed[eviction.request_id] >= eviction.region.stop
            row.eviction = eviction
            self.adoptions.append(eviction)
        for request_id in output.num_scheduled_tokens:
            self._read_states(request_id, computed[request_id])
        written: dict[int, str] = {}
        for request_id, count in output.num_scheduled_tokens.items():
            self._write(request_id, computed[request_id], count, rejected.get(request_id, 0), written)
            if (observed := message.observe.get(request_id)) is not None:
                first, stop = observed
                assert stop - first == self._window
                chunk = range(max(computed[request_id], first), min(computed[request_id] + count, stop))
                row = self._rows[request_id]
                if row.window != observed:
                    row.window, row.seen_window = observed, set()
                row.seen_window.update(chunk)
            if request_id in message.accumulate:
                row, start = self._rows[request_id], computed[request_id]
                assert row.accumulated == start, f"{request_id}: {row.accumulated} of {start} queries"
                row.accumulated += count
            if request_id in message.reconstruct:
                self._repeat(request_id, message.reconstruct[request_id], computed[request_id], count)
        for request_id, count in output.num_scheduled_tokens.items():
            end = computed[request_id] + count - rejected.get(request_id, 0)
            self._rows[request_id].end = end
            self._read(request_id, end)
        self._held.update(message.held)
        self._held.difference_update(score.request_id for score in message.scores)
        assert [e.score for e in message.evictions] == message.scores, "scored and packed in one step"
        self.cancelled = {e.request_id: "declined" for e in message.evictions if e.request_id in self.declines}
        for eviction in message.evictions:
            # One that fails half-way has written some, too.
            change = self._coded.update if eviction.packing.format.quantised else self._coded.difference_update
            change(eviction.packing.blocks)
            if eviction.request_id not in self.cancelled:
                request_id = eviction.request_id
                self._evict(eviction, set(written), self._rows[request_id].end)
        for request_id, row in self._rows.items():
            if len(row.seen_window) == self._window and request_id not in self._held:
                row.seen_window = set()  # nobody took it, and nobody will

    def _repeat(self, echo: str, wanted: Reconstruction, start: int, count: int) -> None:
        """An echo's tokens pass, for the request that it serves, which must not move meanwhile."""
        first, stop = wanted.part
        served, said = self._tokens_of[wanted.request_id], self._tokens_of[echo]
        assert said[: wanted.stop] == served[: wanted.stop] and wanted.end == len(said) - 1
        assert said[wanted.end - (stop - first) : wanted.end] == served[first:stop], "it says something else"
        parts = self._rows[wanted.request_id].repeated
        assert start in (wanted.stop, parts.get(wanted.part)), f"{echo} goes on at {start}"
        parts[wanted.part] = -1 if start + count == wanted.end else start + count

    def _update_tables(self, output: Any) -> dict[str, int]:
        computed = {}
        for new in output.scheduled_new_reqs:
            self._rows[new.req_id] = self._row(new.block_ids)
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request_id, blocks, done in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed[request_id] = done
            if request_id in cached.resumed_req_ids:
                self._rows[request_id] = self._row(blocks)
            elif blocks is not None:
                row = self._rows[request_id]
                for table, more in zip((row.table, *row.states), blocks, strict=False):
                    table.extend(more)
        return computed

    def _row(self, blocks: Sequence[Sequence[int]]) -> _Row:
        return _Row(list(blocks[0]), [list(blocks[1 + group]) for group in range(len(self._states))])

    def _read_states(self, request_id: str, start: int) -> None:
        """Where a request goes on, each of its states must be that of the token before."""
        for table, tokens in zip(self._rows[request_id].states, self._states, strict=True):
            if start:
                block, expected = table[(start - 1) // tokens], self._expected(request_id, start)[-1]
                assert block > 0, f"{request_id}: no state is there at {start}"
                assert self.memory[block, 0] == expected, f"{request_id}: a state is not that of its {start} tokens"

    def _expected(self, request_id: str, end: int) -> np.ndarray:
        """What slots [0, end) of the request hold: exact up to its eviction, marked from there on."""
        if request_id not in self._exact:
            value, values = 0, []
            for token in self._tokens_of[request_id]:
                value = hash((value, token))
                values.append(value)
            self._exact[request_id] = np.array(values, dtype=np.int64)
        expected = self._exact[request_id][:end].copy()
        row = self._rows[request_id]
        ends = [first for first, _ in row.stamps[1:]] + [end]
        for (first, stamp), last in zip(row.stamps, ends, strict=False):
            expected[first:last] ^= _EVICTED * stamp
        return expected

    def _write(self, request_id: str, start: int, count: int, rejected: int, written: dict[int, str]) -> None:
        row = self._rows[request_id]
        positions = np.arange(start, start + count)
        blocks = np.array(row.table)[positions // self._block_size]
        assert (blocks > 0).all(), f"{request_id} writes into the null block"
        for block in set(blocks.tolist()):
            assert written.setdefault(block, request_id) == request_id, f"two requests write block {block} in one step"
            assert block not in self._coded, f"{request_id} reads codes behind its tokens in block {block}"
        expected = self._expected(request_id, start + count - rejected)[start:]
        self.memory[blocks, positions % self._block_size] = np.append(expected, np.full(rejected, _REJECTED))
        for table, tokens in zip(row.states, self._states, strict=True):
            block = table[(start + count - 1) // tokens]
            assert block > 0 and written.setdefault(block, request_id) == request_id, f"{request_id}: state in {block}"
            self.memory[block, 0] = expected[-1]

    def _read(self, request_id: str, end: int) -> None:
        row, size = self._rows[request_id], self._block_size
        expected, table = self._expected(request_id, end), np.array(row.table)
        first = 0
        if row.eviction is not None:
            shared, first = row.eviction.region.shared_blocks, row.eviction.region.stop // size
            kept = self.memory[row.table[:shared]].ravel()
            assert (kept == expected[: shared * size]).all(), f"{request_id}: a shared block changed"
            packed = self.memory[list(row.eviction.packing.blocks)]
            assert (packed == -row.stamp).all(), f"{request_id}: somebody wrote its packed blocks"
        growth = self.memory[table[first : -(-end // size)]].ravel()[: end - first * size]
        assert (growth == expected[first * size :]).all(), f"{request_id}: a block does not hold its tokens"

    def _visible(self, row: _Row) -> set[int]:
        """Positional blocks that the request still reads."""
        if row.eviction is None:
            return set(row.table)
        full = row.eviction.region.stop // self._block_size
        return {*row.table[: row.eviction.region.shared_blocks], *row.table[full:]}

    def _evict(self, eviction: Eviction, written: set[int], end: int) -> None:
        row, size = self._rows[eviction.request_id], self._block_size
        policy, before = PRESETS[eviction.policy], row.eviction
        assert eviction.score.since == (None if before is None else before.region), (
            f"{eviction.request_id}: since when?"
        )
        if policy.reconstructs:
            parts, region = sorted(row.repeated), eviction.region
            assert set(row.repeated.values()) == {-1}, f"{eviction.request_id}: a part was not repeated to its end"
            assert [first for first, _ in parts[1:]] + [region.stop] == [stop for _, stop in parts]
            assert parts[0][0] == region.tokens[0]
        if policy.accumulates:
            assert row.accumulated == eviction.region.stop, f"{eviction.request_id}: {row.accumulated} queries"
        elif policy.needs_window and not (policy.lasting and eviction.score.later):  # what lasts reads none
            assert row.window == (eviction.region.stop - self._window, eviction.region.stop)
            assert len(row.seen_window) == self._window, f"{eviction.request_id}: {len(row.seen_window)} window queries"
        table = row.table[: -(-eviction.region.stop // size)]
        if before is not None:
            assert before.score.later == eviction.policy, "nothing is known of what is packed"
            assert before.region.shared_blocks == eviction.region.shared_blocks
            table = table[before.region.full_blocks :]
            assert (self.memory[list(before.packing.blocks)] == -row.stamp).all(), "what was packed is gone"
        assert eviction.region.stop <= end, "tokens are packed that were not computed"
        assert list(eviction.score.source_blocks) == table, "the plan's source blocks are not the request's"
        assert not written & set(eviction.packing.blocks), "a packed block was written in the same step"
        for other_id, other in self._rows.items():
            assert not self._visible(other) & set(eviction.packing.blocks), f"{other_id} can see a packed block"
        self._stamp += 1
        row.eviction = eviction
        row.stamps.append((end, self._stamp))
        if eviction.number:
            self._kept[eviction.number] = eviction, self._stamp
        self.memory[list(eviction.packing.blocks)] = -self._stamp
        self.evictions.append(eviction)

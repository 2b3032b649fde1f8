"""What a scheduler has counted, handed out with vLLM's statistics: increases, for several API servers take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_defensive.counts import Increase, State, Totals, WorkerReport, record_of
from vllm_defensive.plan import Eviction


class Ledger:
    """Since the last statistics: what the workers reported, who was evicted, and what has changed of the totals."""

    def __init__(self, ranks: int) -> None:
        """ranks: tensor-parallel workers, of which vLLM hands on the first one's output only."""
        self._ranks = ranks
        self._told = Totals()
        self._state = State()
        self._worker = WorkerReport()
        self.stale_score = False  # as the workers last said

    def note_worker(self, report: WorkerReport) -> None:
        if report.stale_score is not None:
            self.stale_score = report.stale_score
        # Each rank packs as many pages as the first.
        self._worker.add(report.microseconds, [pages * self._ranks for pages in report.decile_pages])

    def take(self, totals: Totals, state: State, done: Sequence[tuple[Eviction, bool]]) -> Increase | None:
        """What is new; None if nothing is. totals, state: as they are now. done: evictions since the last call,
        and whether each was adopted."""
        worker = self._worker
        if not done and not worker and state == self._state and totals == self._told:
            return None
        increase = Increase(records=[record_of(*each) for each in done])
        if totals != self._told:
            increase.totals, self._told = totals - self._told, replace(totals)
        if state != self._state:
            increase.state = self._state = state
        if worker:
            increase.microseconds, increase.decile_pages = worker.microseconds, worker.decile_pages
            self._worker = WorkerReport()
        return increase

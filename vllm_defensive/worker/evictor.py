"""How a worker of any device carries out evictions: a request is scored, then packed; today in one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_defensive import audit
from vllm_defensive.compat.base import get_logger
from vllm_defensive.counts import WorkerReport
from vllm_defensive.plan import Eviction, Score
from vllm_defensive.policy import PRESETS, LayerScores, Policy, ReduceHeads, Selection
from vllm_defensive.settings.engine import AUTO_POLICIES, EvictionConfig
from vllm_defensive.worker.known import Known
from vllm_defensive.worker.learned import LearnedWeights, Lessons
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.report import pages_by_decile
from vllm_defensive.worker.window import IncompleteError

logger = get_logger("kv_eviction")

Selections = tuple[Selection, ...]  # one for each part of a packing's format

# Two scores that compete: while one is learned, what both say is compared.
JOINED, JOINED_PARTS = AUTO_POLICIES["learned"], (AUTO_POLICIES["window"], "learnedkv")


class Evictor(ABC):
    """Evictions on one worker. A request that cannot be scored or packed is not evicted, which is reported: it goes on
    over its whole cache, and no other request hears of it.

    With tensor parallelism all ranks must do the same, so that only what they all see alike is a reason there.
    """

    def __init__(
        self,
        config: EvictionConfig,
        projections: Projections,
        decile_L: Tensor,
        rank: tuple[int, int] = (0, 1),
        reduce_heads: ReduceHeads | None = None,
    ) -> None:
        """decile_L: `report.layer_deciles`, on the device. rank, reduce_heads: see `EvictionWorker`."""
        self._config = config
        self._projections = projections
        self._decile_L = decile_L
        self._rank = rank
        self._reduce_heads = reduce_heads
        self.learned: LearnedWeights | None = None
        """Where a policy is served that goes by a learned score."""
        self.lessons: Lessons | None = None
        """While a score is being learned: what each second look adds to."""
        self._scored: dict[str, Any] = {}  # what `_score` returned, until it is packed
        self._known: Known[Any] = Known()
        self._reasons: tuple[type[Exception], ...] = (IncompleteError,) if rank[1] > 1 else (Exception,)
        self._report = WorkerReport()
        self._audited: dict[int, Selections] = {}  # where audits are wanted: of packings that others may begin with

    @abstractmethod
    def _score(self, score: Score) -> Any:
        """Weigh a request's tokens, for `_pack`. Raises IncompleteError if what that takes was not seen."""

    @abstractmethod
    def _scores_by(self, scored: Any, policy: Policy) -> list[LayerScores]:
        """What another policy, which reads no more than the one it was scored by, says of a request."""

    @abstractmethod
    def _pack(self, scored: Any, eviction: Eviction) -> Selections:
        """Choose pages and tokens, copy them into the packed blocks, and make steps to come find them there."""

    @abstractmethod
    def _start(self) -> Any:
        """The time now, of the device's kind."""

    @abstractmethod
    def _finish(self, started: Any, decile_pages: Tensor) -> None:
        """Note in the report what was packed since `started`; whenever the device gets there."""

    def run(self, scores: Sequence[Score], evictions: Sequence[Eviction]) -> None:
        """Score requests, and pack those that have been scored, now or in an earlier step. Afterwards nothing reads
        blocks `[s, g)` of those that were packed."""
        if not scores and not evictions:
            return
        started, waiting = self._start(), {eviction.request_id: eviction for eviction in evictions}
        packed: list[tuple[Eviction, Selections]] = []
        for score in scores:
            self.score(score)
            # At once, while what was read is at hand.
            if (eviction := waiting.pop(score.request_id, None)) is not None:
                packed += self.pack(eviction)
        for eviction in waiting.values():
            packed += self.pack(eviction)
        if packed:
            pages_L = torch.stack([part.pages_LH for _, parts in packed for part in parts]).sum(dim=(0, 2))
            self._finish(started, pages_by_decile(pages_L, self._decile_L))
        for eviction, parts in packed:
            self._audit(eviction, parts)

    def adopt(self, evictions: Sequence[Eviction]) -> None:
        """Requests begin with what was packed for an earlier one: they are audited like that."""
        for eviction in evictions:
            self._known.adopt(eviction)
            if self._config.audit is not None:
                self._audit(eviction, self._audited[eviction.number])

    def _audit(self, eviction: Eviction, parts: Selections) -> None:
        if self._config.audit is not None:
            audit.record(self._config.audit, eviction, parts, self._rank)
            if eviction.number:
                self._audited[eviction.number] = parts

    def score(self, score: Score) -> None:
        """Weigh a request's tokens and keep the result until it is packed or forgotten."""
        try:
            self._scored[score.request_id] = scored = self._score(score)
            if self.lessons is not None and score.policy == JOINED:
                self.lessons.compare(*(self._scores_by(scored, PRESETS[name]) for name in JOINED_PARTS))
        except self._reasons as error:
            self._cancel(score.request_id, error)

    def pack(self, eviction: Eviction) -> list[tuple[Eviction, Selections]]:
        """Pack a request that has been scored, if it could be."""
        if (scored := self._scored.pop(eviction.request_id, None)) is None:
            return []
        try:
            return [(eviction, self._pack(scored, eviction))]
        except self._reasons as error:
            self._cancel(eviction.request_id, error)
            return []

    def _cancel(self, request_id: str, error: Exception) -> None:
        """Nothing has been dropped yet: what is packed is read by nobody before `_pack` has come to its end."""
        unforeseen = not isinstance(error, IncompleteError)
        logger.warning("KV eviction: %s is served whole: %s", request_id, error, exc_info=unforeseen)
        self._report.cancelled[request_id] = str(error)

    def forget(self, request_ids: Iterable[str], numbers: Iterable[int] = ()) -> None:
        """These requests have ended, or begin anew. numbers: of evictions that nobody will begin with any more."""
        request_ids, numbers = list(request_ids), list(numbers)
        self._known.forget(request_ids, numbers)
        for request_id in request_ids:
            self._scored.pop(request_id, None)
        for number in numbers:
            self._audited.pop(number, None)

    def forget_weights(self, *, same: bool = False) -> None:
        """The model may have other weights now: what was derived from the old ones is not used again, but for a learned
        score, which still says more than none. same: it has not."""
        self._projections.forget()
        self._report.other_weights = self._report.other_weights or not same
        if self.learned is not None and not same:
            logger.warning_once(
                "KV eviction: the model's weights may have changed, and its learned score is still the old one; make "
                "another one in its place, and have it read with collective_rpc('load_learned')"
            )
            self._report.stale_score = True

    def go_by(self, learned: LearnedWeights) -> None:
        """Use this learned score from now on."""
        self._report.other_weights = self._report.other_weights or self.learned is not None
        self.learned, self._report.stale_score = learned, False

    def take_report(self) -> WorkerReport:
        """What was done since the last call."""
        report, self._report = self._report, WorkerReport()
        return report

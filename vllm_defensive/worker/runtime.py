"""What a worker of any device knows of requests between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

from vllm_defensive.plan import Eviction, StepMessage
from vllm_defensive.worker.reconstruction import Reconstructions
from vllm_defensive.worker.window import WindowQueries

Placed = TypeVar("Placed")


class Runtime(ABC, Generic[Placed]):
    """`begin` and `end` bracket each real step; outside of them batches are dummies. Placed: what a device knows of
    where an eviction has put each head's pages."""

    def __init__(self, windows: WindowQueries, reconstructions: Reconstructions) -> None:
        self.windows = windows
        self.reconstructions = reconstructions
        self._message: StepMessage | None = None
        self._held: set[str] = set()  # past their stop, and not scored yet
        # Of evictions that later requests may begin with, by number.
        self._kept: dict[int, Placed] = {}

    def begin(self, message: StepMessage, gone: Iterable[str]) -> None:
        """A real step starts. gone: requests that ended, were preempted, or enter the batch (anew): whatever we knew of
        them is void."""
        for request_id in (*gone, *message.released):
            self.forget(request_id)
        for number in message.forgotten:
            self._kept.pop(number, None)
        for eviction in message.adopted:
            self.adopt(eviction, self._kept[eviction.number])
        if message.clear:
            self.clear(message.clear)
        self._held.update(message.held)
        self._held.difference_update(score.request_id for score in message.scores)
        self._message = message

    def place(self, eviction: Eviction, placed: Placed) -> None:
        """An eviction was carried out: make it known to the steps that come, and to requests that begin with it."""
        self.install(eviction, placed)
        if eviction.number:
            self._kept[eviction.number] = placed

    @abstractmethod
    def install(self, eviction: Eviction, placed: Placed) -> None:
        """Make an eviction known to the steps that come."""

    def adopt(self, eviction: Eviction, placed: Placed) -> None:
        """A request enters the batch with what was packed for an earlier one."""
        self.install(eviction, placed)

    @abstractmethod
    def clear(self, blocks: Sequence[int]) -> None:
        """Zero the pages of these blocks."""

    @abstractmethod
    def step(self, common: Any) -> Any:
        """What is special about a batch. common: vLLM's `CommonAttentionMetadata`. Asked again in the same step, as for
        another builder, it answers the same."""

    def end(self) -> None:
        """The step's forward pass is over."""
        self._message = None

    def forget(self, request_id: str) -> None:
        self.windows.drop(request_id)
        self.reconstructions.drop(request_id)
        self._held.discard(request_id)

    def drop_untaken(self) -> None:
        """The step's evictions are over: what was kept for one, and none took, is forgotten, unless one is to come."""
        self.windows.drop_complete(self._held)

    @property
    def observing(self) -> bool:
        """Whether queries of this step are to be kept, or looked at."""
        return self._message is not None and bool(self._message.observe or self._message.reconstruct)

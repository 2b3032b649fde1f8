"""Packings that stay for a time though no request uses them: each has one holder more, within a share of the pool."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar


class Held(Protocol):
    """A packing: its blocks, and how many hold it."""

    blocks: Sequence[Any]
    holders: int


P = TypeVar("P", bound=Held)


class Pins(Generic[P]):
    """Of one library. blocks: that are pinned."""

    def __init__(
        self,
        most_blocks: int,
        hold: Callable[[P], None],
        leave: Callable[[P], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """most_blocks: that may be. hold, leave: see `Library`. clock: seconds."""
        self.most_blocks, self._hold, self._leave, self.clock = most_blocks, hold, leave, clock
        self.blocks = 0
        self._until: dict[P, float] = {}
        self._soonest = math.inf  # nothing ends before

    def __contains__(self, packing: P) -> bool:
        return packing in self._until

    def __iter__(self) -> Iterator[P]:
        return iter(self._until)

    @property
    def idle_blocks(self) -> int:
        """Blocks that are pinned, and that no request holds."""
        return sum(len(packing.blocks) for packing in self._until if packing.holders == 1)

    def set(self, packing: P, seconds: float) -> None:
        """Pin a packing from now on for so long, if there is room; 0: let go of it."""
        if not seconds:
            self.drop(packing)
        elif packing in self._until or self.blocks + len(packing.blocks) <= self.most_blocks:
            if packing not in self._until:
                self._hold(packing)
                self.blocks += len(packing.blocks)
            self._until[packing] = self.clock() + seconds
            self._soonest = min(self._soonest, self._until[packing])

    def drop(self, packing: P) -> None:
        """Let go of a packing, if it is pinned."""
        if self._until.pop(packing, None) is not None:
            self.blocks -= len(packing.blocks)
            self._leave(packing)

    def end(self) -> None:
        """Let go of what was pinned for long enough."""
        if not self._until or (now := self.clock()) < self._soonest:
            return
        for packing in [packing for packing, until in self._until.items() if until <= now]:
            self.drop(packing)
        self._soonest = min(self._until.values(), default=math.inf)

    def drop_all(self) -> None:
        for packing in list(self._until):
            self.drop(packing)

"""The queries of each finishing prompt's observation window, kept while its last chunks run."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Capture:
    """Copy query rows `[source, source + count)` of a step's batch to `[target, ...)` of a request's window."""

    window_AWQD: Tensor
    source: int
    target: int
    count: int

    def take(self, reader: int, query_TQD: Tensor) -> None:
        self.window_AWQD[reader, self.target : self.target + self.count] = query_TQD[
            self.source : self.source + self.count
        ]


class IncompleteError(RuntimeError):
    """Not everything was seen that the scoring of a request takes."""


class WindowQueries:
    """Post-RoPE queries of the last `W` tokens before each eviction, for all layers that read the evicted caches.

    A window may be spread over several chunks, and chunks of other requests come between, so each request has a buffer
    from the first step that touches its window to its eviction. Positions are marked as they pass, not counted: to plan
    a step twice, as for two metadata builders, is to plan it once.
    """

    def __init__(
        self,
        num_readers: int,
        window: int,
        num_query_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape = (num_readers, window, num_query_heads, head_size)
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}
        self._marks: dict[str, int] = {}  # bit `i`: the window's query `i` was seen
        self._all_marks = (1 << window) - 1

    def plan(
        self, request_id: str, observed: tuple[int, int], chunk: tuple[int, int], row_start: int
    ) -> Capture | None:
        """The copy for one row of a batch: token positions `chunk` of a prompt, at batch row `row_start`, of which
        those in `observed`, the window, are kept."""
        first, stop = observed
        assert stop - first == self._shape[1], f"{request_id}: a window of {stop - first} tokens"
        begin, end = max(chunk[0], first), min(chunk[1], stop)
        if begin >= end:
            return None
        if request_id not in self._buffers:
            self._buffers[request_id] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._marks[request_id] = 0
        self._marks[request_id] |= ((1 << (end - begin)) - 1) << (begin - first)
        return Capture(self._buffers[request_id], row_start + begin - chunk[0], begin - first, end - begin)

    def blank(self) -> Tensor:
        """A window of zeros, nobody's, to warm kernels up with."""
        return torch.zeros(self._shape, dtype=self._dtype, device=self._device)

    def pop(self, request_id: str) -> Tensor:
        """The complete window `[A, W, Q, D]`. Raises IncompleteError if some of it was not seen."""
        marks, window_AWQD = self._marks.pop(request_id, 0), self._buffers.pop(request_id, None)
        if window_AWQD is None or marks != self._all_marks:
            raise IncompleteError(f"{marks.bit_count()} of {self._shape[1]} window queries were seen")
        return window_AWQD

    def drop_complete(self, held: Container[str] = ()) -> None:
        """Forget windows that no eviction took: the scheduler found nothing to gain when the request got there. held:
        requests that are still to be evicted."""
        for request_id in [r for r, marks in self._marks.items() if marks == self._all_marks and r not in held]:
            self.drop(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a request that ended, was preempted or starts anew."""
        self._buffers.pop(request_id, None)
        self._marks.pop(request_id, None)

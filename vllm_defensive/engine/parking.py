"""Requests that wait for what another one is packing, beside vLLM's queue: there each would be looked at in every step,
while nothing can be done for any of them."""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_defensive.engine.published import Key


class Parking:
    """Of one scheduler. In a step that finds out that a request must wait, vLLM passes it over; afterwards it is taken
    out of the queue, and it comes back to its head once nobody is packing what it waits for."""

    def __init__(self, scheduler: Scheduler, is_being_packed: Callable[[Key], bool]) -> None:
        self._scheduler, self._is_being_packed = scheduler, is_being_packed
        self._passed_over: list[tuple[Key, Request]] = []  # in this step
        self._parked: dict[Key, dict[str, Request]] = {}
        self._key_of: dict[str, Key] = {}

    def __len__(self) -> int:
        return len(self._key_of)

    def pass_over(self, key: Key, request: Request) -> None:
        """vLLM is told to look at this request another time."""
        self._passed_over.append((key, request))

    def park(self) -> None:
        """After a step was scheduled."""
        if not self._passed_over:
            return
        self._scheduler.waiting.remove_requests([request for _, request in self._passed_over])
        for key, request in self._passed_over:
            self._parked.setdefault(key, {})[request.request_id] = request
            self._key_of[request.request_id] = key
        self._passed_over.clear()

    def unpark(self) -> None:
        """Before a step is scheduled."""
        for key in [key for key in self._parked if not self._is_being_packed(key)]:
            ready = self._parked.pop(key)
            for request_id in ready:
                del self._key_of[request_id]
            self._scheduler.waiting.prepend_requests(reversed(ready.values()))

    def forget(self, request_id: str) -> None:
        """A request has ended, perhaps one that waits here."""
        if (key := self._key_of.pop(request_id, None)) is not None:
            del self._parked[key][request_id]

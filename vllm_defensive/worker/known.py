"""What a worker knows of tokens that are packed and will be chosen from again: of requests, and of packings that later
requests begin with. Pages do not say it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from vllm_defensive.plan import Eviction
from vllm_defensive.worker.window import IncompleteError

Kept = TypeVar("Kept")


class Known(Generic[Kept]):
    """Each device has a kind of its own of what is known. It is never changed: several requests may share it."""

    def __init__(self) -> None:
        self._of_request: dict[str, Kept] = {}
        self._of_number: dict[int, Kept] = {}  # of evictions that later requests may begin with

    def __len__(self) -> int:
        return len(self._of_request) + len(self._of_number)

    def note(self, eviction: Eviction, kept: Kept) -> None:
        """This is known of what an eviction has packed."""
        self._of_request[eviction.request_id] = kept
        if eviction.number:
            self._of_number[eviction.number] = kept

    def adopt(self, eviction: Eviction) -> None:
        """A request begins with what was packed for an earlier one."""
        if (kept := self._of_number.get(eviction.number)) is not None:
            self._of_request[eviction.request_id] = kept

    def of(self, request_id: str) -> Kept:
        """Raises IncompleteError where nothing is known."""
        if request_id not in self._of_request:
            raise IncompleteError("nothing is known of what it holds packed")
        return self._of_request[request_id]

    def forget(self, request_ids: Iterable[str], numbers: Iterable[int] = ()) -> None:
        """These requests have ended, or begin anew. numbers: of evictions that nobody will begin with any more."""
        for request_id in request_ids:
            self._of_request.pop(request_id, None)
        for number in numbers:
            self._of_number.pop(number, None)

"""What vLLM's outputs cannot say of an evicted request by themselves, put on them before they leave the scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput
from vllm.v1.request import Request

from vllm_defensive.engine.lifecycle import Lifecycle
from vllm_defensive.settings.engine import KEY, EvictionConfig
from vllm_defensive.settings.request import settings_or_none


class Amendments:
    """Few requests need any: while there are none, a step asks whether two sets are empty.

    *Reports.* A stop string is found by the server, which answers with what came along with that very output; the
    engine hears of it afterwards. So the report rides on each output of a request that has stop strings.

    *Tokens written to the prefix cache.* vLLM counts them with the first output, by the blocks that the request holds
    then. With a boundary its originals have gone back by that time.
    """

    def __init__(
        self, settings: EvictionConfig, lifecycle: Lifecycle, live: Mapping[str, Request], caching: bool
    ) -> None:
        """live: the scheduler's requests. caching: there is a prefix cache."""
        self._settings, self._lifecycle, self._live, self._caching = settings, lifecycle, live, caching
        self._reporting: set[str] = set()
        self._silent: set[str] = set()  # have a boundary, and have not said anything yet

    def expect(self, request: Request) -> None:
        """A request has come."""
        params = request.sampling_params
        if params is None or not params.extra_args:
            return
        settings = settings_or_none(self._settings, request)
        if settings.report and params.stop:
            self._reporting.add(request.request_id)
        if (settings.boundary is not None or settings.outlives) and self._caching:
            self._silent.add(request.request_id)

    def forget(self, request_id: str) -> None:
        self._reporting.discard(request_id)
        self._silent.discard(request_id)

    def hashed_tokens(self, scheduled: Iterable[str]) -> dict[str, int]:
        """Of the step's requests whose first output may come: tokens that were hashed. To be asked before the step is
        processed, which may end them."""
        found: dict[str, int] = {}
        for request_id in self._silent.intersection(scheduled) if self._silent else ():
            life = self._lifecycle.lives.get(request_id)
            if life is not None and life.packing is not None:
                found[request_id] = life.packing.region.tokens[1]
            elif life is not None and not life.ahead:
                self._silent.discard(request_id)  # vLLM counts right
        return found

    def apply(self, outputs: Iterable[Any], hashed_tokens: Mapping[str, int]) -> None:
        """Amend the outputs of one step. hashed_tokens: what `hashed_tokens` said before."""
        if not self._reporting and not hashed_tokens:
            return
        for output in outputs:
            request_id = output.request_id
            if output.prefill_stats is not None and request_id in hashed_tokens:
                output.prefill_stats.finalize(hashed_tokens[request_id])
                self._silent.discard(request_id)
            if request_id in self._reporting and request_id in self._live:
                output.kv_transfer_params = {KEY: self._lifecycle.report(request_id)}


def empty_answer(request: Request) -> EngineCoreOutput:
    """What is told of a request that has ended before anything of it was scheduled."""
    request.record_event(EngineCoreEventType.SCHEDULED)  # from which vLLM reckons how long it has waited
    ended, events = request.get_finished_reason(), request.take_events()
    return EngineCoreOutput(request.request_id, [], finish_reason=ended, events=events)

"""A second look at a document: echoes, requests of our own that repeat it over its intact cache, so that their queries
can score it (KVzip, arXiv 2505.23416).

An echo begins with every block of the request that it serves, and takes blocks of its own for what it repeats: to vLLM
it is a prefill like any other, cut into the same chunks, in the same steps as everybody's decode. It ends where others
would begin to answer, is never hashed, and what it wrote is gone with it. The served request stands still meanwhile;
its next tokens take the positions, and the slots of its last block, that the echo had used.

There is one echo at a time. One that loses its memory is not resumed: another one begins, and since a score is the
largest attention that was seen, what it repeats once more counts once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_defensive.engine.life import ECHOING, PREFILL, Life
from vllm_defensive.engine.lifecycle import Lifecycle
from vllm_defensive.packing import ECHO_OVERHEAD, ECHO_REQUESTS
from vllm_defensive.plan import Reconstruction
from vllm_defensive.policy import PRESETS

INSTRUCTION = "\n\nRepeat the previous context exactly:\n\n"
SHARE = 4
"""Where others decode, a step has at most a fourth of its tokens from an echo: on a CPU each costs as much as three to
four of a prefill's, for it looks twice at up to twice as many keys, and nobody should wait much longer for it than for
a chunk of a prompt (docs/evidence.md)."""
OVERLAP = 8
"""Tokens before its part that an echo of a later part begins with: they say which part is meant."""


def instruction_ids(tokenizer: Any) -> tuple[int, ...]:
    """The instruction's token ids; none for a model that is served without a tokenizer."""
    if tokenizer is None:
        return ()
    return tuple(tokenizer.encode(INSTRUCTION, add_special_tokens=False)[: ECHO_OVERHEAD - OVERLAP - 1])


class Echoes:
    """Echoes of one scheduler."""

    def __init__(self, scheduler: Scheduler, lifecycle: Lifecycle, instruction: Sequence[int]) -> None:
        self._scheduler, self._lifecycle, self._instruction = scheduler, lifecycle, tuple(instruction)
        self._echo: Request | None = None  # the one that is there
        self._life: Life | None = None  # of the request that it serves
        self._part = (0, 0)  # positions that it repeats
        self._count = 0
        self._ended: set[str] = set()  # echoes whose outputs nobody wants
        self._admitted = scheduler.max_num_active_reqs
        self._refused = self._preempted = False  # in this step: there was no memory for the echo; somebody lost his
        self.most_tokens = 0  # that an echo may take of this step

    @property
    def running(self) -> bool:
        """Whether an echo is among the scheduler's running requests."""
        return self._echo is not None and self._echo.status == RequestStatus.RUNNING

    @property
    def waiting(self) -> bool:
        """Whether an echo is among those that wait."""
        return self._echo is not None and self._echo.status == RequestStatus.WAITING

    def lets_in(self, life: Life | None) -> bool:
        """Whether a request that holds nothing may come in. Nobody may while an echo waits, be it for memory or for
        the place of an adapter: whoever comes then could take that from it time and again."""
        if self.waiting:
            return False
        if life is None or not life.echo_tokens or life.published is not None:
            return True
        lives = self._lifecycle.lives.values()
        return sum(other.echo_tokens > 0 and other.phase in (PREFILL, ECHOING) for other in lives) < ECHO_REQUESTS

    def refuse(self, request_id: str) -> None:
        """There was no memory for this request in this step."""
        self._refused = self._refused or self.owns(request_id)

    def end(self) -> None:
        """End the echo, if there is one, and give its blocks back. Another one begins when it may."""
        if self._echo is not None:
            self._scheduler.finish_requests(self._echo.request_id, RequestStatus.FINISHED_ABORTED)

    def owns(self, request_id: str) -> bool:
        return self._echo is not None and self._echo.request_id == request_id

    # -- around a step -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before a step is scheduled: the echo of a request that is gone is ended, and the next one begins."""
        if not self._served():
            self.end()
        self._refused = self._preempted = False
        scheduler = self._scheduler
        if self._echo is None and self._lifecycle.echoing and scheduler.pause_state != PauseState.PAUSED_ALL:
            self._start(next(iter(self._lifecycle.echoing.values())))
        if self._echo is not None:
            alone = all(self.owns(r.request_id) or stands_still(self._lifecycle, r) for r in scheduler.running)
            self.most_tokens = max(1, scheduler.max_num_scheduled_tokens // (1 if alone else SHARE))
        # It has a slot of its own in the workers: it must not wait for one of those that wait for it.
        scheduler.max_num_active_reqs = self._admitted + (self._echo is not None)

    def scheduled(self, tokens: Mapping[str, int]) -> None:
        """After a step was scheduled, with so many tokens of each request."""
        echo, life = self._echo, self._life
        if echo is None or life is None or not self._served():
            return
        if echo.request_id in tokens:
            self._lifecycle.totals.echo_tokens += tokens[echo.request_id]
            life.repeated += tokens[echo.request_id]
            policy = PRESETS[life.settings.policy]
            part = Reconstruction(
                life.request.request_id, life.stop, self._part, echo.num_tokens, policy.reconstruction
            )
            last = echo.num_computed_tokens >= echo.num_tokens and self._part[1] == life.stop
            self._lifecycle.reconstruct(life, echo.request_id, part, last=last)
        elif not tokens and self._refused and not self._preempted:
            self._make_way()

    def processed(self, outputs: Iterable[Any]) -> None:
        """What a step answered to clients, without the echoes' answers. outputs: one for each client."""
        for of_client in outputs if self._ended else ():
            of_client.outputs = [o for o in of_client.outputs if o.request_id not in self._ended]
        self._ended.clear()

    def freed(self, request: Request) -> None:
        """A request has ended, or was aborted."""
        if self.owns(request.request_id):
            done = request.status != RequestStatus.FINISHED_ABORTED
            self._ended.add(request.request_id)
            if done and self._life is not None:
                self._life.echoed = self._part[1]
            self._echo = self._life = None

    def preempted(self, request: Request) -> None:
        """A request has lost its blocks, and waits. An echo would have to be resumed over them."""
        self._preempted = True
        if self.owns(request.request_id):
            self.end()

    # -- one echo ------------------------------------------------------------------------------------------------------

    def _served(self) -> bool:
        """Whether the request that the echo serves still lives, and the same life."""
        life = self._life
        return life is not None and self._lifecycle.lives.get(life.request.request_id) is life

    def _start(self, life: Life) -> None:
        first, stop = life.next_part
        prompt = life.request.all_token_ids
        again = prompt[max(first - OVERLAP, 0) : first] if life.echoed else []
        tokens = [*prompt[: life.stop], *self._instruction, *again, *prompt[first:stop]]
        self._count += 1
        echo = Request(
            f"{life.request.request_id}-echo-{self._count}",
            tokens,
            SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False),
            None,
            client_index=life.request.client_index,
            # Later than the request that it serves: whoever is thrown out by that, it goes first.
            arrival_time=math.nextafter(life.request.arrival_time, math.inf),
            lora_request=life.request.lora_request,
            priority=life.request.priority,
        )
        echo.num_computed_tokens = life.stop  # whoever waits with computed tokens comes first
        self._echo, self._life, self._part = echo, life, (first, stop)
        scheduler = self._scheduler
        Scheduler.add_request(scheduler, echo)
        self._lifecycle.serve(echo)
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
            blocks = list(manager.req_to_blocks[life.request.request_id])
            manager.block_pool.touch([block for block in blocks if not block.is_null])
            manager.req_to_blocks[echo.request_id] = blocks
            manager.num_cached_block[echo.request_id] = len(blocks)

    def _make_way(self) -> None:
        """Nobody could be scheduled, and the echo found no memory. If all others stand still for echoes of their own,
        the last of these gives its blocks back; if there is none, the request is served whole."""
        scheduler, life = self._scheduler, self._life
        assert life is not None
        if any(request.num_in_flight_tokens for request in scheduler.running):
            return
        others = [r for r in scheduler.running if r is not life.request and stands_still(self._lifecycle, r)]
        if others:
            scheduler.running.remove(others[-1])
            scheduler._preempt_request(others[-1], time.monotonic())
        elif all(stands_still(self._lifecycle, r) for r in scheduler.running):
            self.end()
            scheduler.kv_cache_manager.block_pool.free_blocks(self._lifecycle.give_up(life))


def stands_still(lifecycle: Lifecycle, request: Request) -> bool:
    life = lifecycle.lives.get(request.request_id)
    return life is not None and life.phase is ECHOING

"""vLLM's schedulers, with a message for the workers on every output of which they must know."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import Request, RequestStatus

from vllm_defensive.compat import channels, contract, scheduling
from vllm_defensive.counts import WEIGHT_CALLS, State
from vllm_defensive.engine.admission import ExpectedLength, Load, fits
from vllm_defensive.engine.amendments import Amendments, empty_answer
from vllm_defensive.engine.echo import Echoes, instruction_ids
from vllm_defensive.engine.kv_manager import EvictionBlockManager
from vllm_defensive.engine.life import ECHOING, PREFILL
from vllm_defensive.engine.parking import Parking
from vllm_defensive.engine.published import Key
from vllm_defensive.engine.stats import Ledger
from vllm_defensive.settings.engine import KEY, from_vllm_config

# An answer that ended by itself: its length says something of the next ones'.
_ENDED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION)


class _EvictionMixin(Scheduler):
    """The whole addition; it works the same on top of the sync and of the async scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        (manager,) = (m for m in managers if isinstance(m, EvictionBlockManager))  # workers refuse any other number
        manager.outlook.beside([other for other in managers if other is not manager], self._state_blocks)
        manager.requests = self.requests
        self.eviction_manager, self._lives = manager, manager.lifecycle.lives
        self._again = again = manager.again
        again.drafts, again.step_tokens = self.num_spec_tokens, self.max_num_scheduled_tokens
        again.ahead = isinstance(self, AsyncScheduler)
        # Set where admission is steady, and the blocks of the last hit in the prefix cache are then remembered.
        steady = manager.eviction.admission == "steady"
        self._answers = ExpectedLength(manager.block_size) if steady else None
        self._last_hit: Sequence[KVCacheBlock] = ()
        self._refused: tuple[Any, ...] = ()  # who was not let in, and what was looked at
        self._longest_hit: int | None = None
        self._starved = False  # in this step there was no memory for somebody
        self._ended_at_once: list[Request] = []  # since the last step that was processed
        self._told_of_weights = False  # by who has changed them; the workers say the same with the next step
        self._waits_for: Key | None = None  # whose packing the request that is looked at waits for
        self._parking = Parking(self, manager.lifecycle.is_being_packed)
        # A request must have a token left to compute; with one, vLLM would fill the row up with placeholders for
        # drafts and assert that they stay.
        self._least_left = 2 if self.num_spec_tokens else 1
        self._amendments = Amendments(
            manager.eviction, manager.lifecycle, self.requests, caching=manager.enable_caching
        )
        manager.outlook.max_model_len = self.max_model_len
        manager.outlook.own_positions = self.vllm_config.model_config.uses_mrope
        # Of vLLM's structured output, which runs in this process; None if the model is served without one.
        tokenizer = getattr(self.structured_output_manager, "tokenizer", None)
        self._echoes = Echoes(self, manager.lifecycle, instruction_ids(tokenizer))
        self._ledger = Ledger(self.vllm_config.parallel_config.tensor_parallel_size)
        scheduling.bound_prefix_cache(
            self.kv_cache_manager.coordinator,
            lambda: self._longest_hit,
            self._lives,
            manager.lifecycle.cacheable_tokens,
        )
        scheduling.bound_allocations(
            self.kv_cache_manager,
            self._lives,
            self._admits,
            manager.note_ready,
            self._refuse,
        )

    def _state_blocks(self, spec: MambaSpec) -> int:
        """Blocks of a request's states in a group of recurrent layers, at most: where they are cached, the one before
        stays until the next one was made of it."""
        return cdiv(spec.max_memory_usage_bytes(self.vllm_config), spec.page_size_bytes)

    def _refuse(self, request_id: str) -> None:
        """There was no memory for this request in this step."""
        self._starved = True
        self._echoes.refuse(request_id)
        self.eviction_manager.pressure.refuse(request_id)

    def add_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().add_request(request, *args, **kwargs)
        if self.requests.get(request.request_id) is request:  # and not more input of a session
            if self.eviction_manager.unpin(request):
                self._ended_at_once.append(request)
                self.finish_requests(request.request_id, RequestStatus.FINISHED_STOPPED)
                return
            self.eviction_manager.outlook.relatives.add(request)
            self._amendments.expect(request)
            if self.eviction_manager.eviction.prompts == "bounded" and not self._can_be_served(request):
                self._ended_at_once.append(request)
                self.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def _can_be_served(self, request: Request) -> bool:
        life = self.eviction_manager.life(request.request_id)
        return life is None or self._again.fits(life)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.eviction_manager.release_processed()
        library = self.eviction_manager.lifecycle.library
        library.settle()
        self._starved = False
        self._parking.unpark()
        self._echoes.begin()
        output = super().schedule(*args, **kwargs)
        self._parking.park()
        stuck = not output.num_scheduled_tokens and not any(r.num_in_flight_tokens for r in self.running)
        if self._starved and stuck and library.pins.blocks:
            library.pins.drop_all()  # nobody could be scheduled, and somebody wants memory
        else:
            self._echoes.scheduled(output.num_scheduled_tokens)
        self._again.begin(output.num_scheduled_tokens, self.running)
        self.eviction_manager.pressure.begin(self.running)
        message = self.eviction_manager.lifecycle.take_message(output.num_scheduled_tokens)
        channels.attach_message(output, message)
        return output

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's lookup for a request about to be admitted, no longer than the block manager allows; or what was packed
        for an earlier one. From vLLM 0.33 on it is given a limit of its own, which is handed on: P8 takes the lesser of
        the two."""
        self.eviction_manager.look_anew(request.request_id)
        self._waits_for = self.eviction_manager.waits_for(request, self._least_left)
        if self._waits_for is not None:
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        if (found := self.eviction_manager.adoptable(request, self._least_left)) is not None:
            (adopted, blocks_of), self._last_hit = found, ()
            in_order = tuple(blocks_of[group] for group in range(len(blocks_of)))
            return self.kv_cache_manager.create_kv_cache_blocks(in_order), adopted, 0, False
        self._waits_for = self.eviction_manager.makes_way_for(request)
        if self._waits_for is not None:
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        self._longest_hit = self.eviction_manager.longest_hit(request.request_id)
        if self._longest_hit is not None and self.num_spec_tokens:
            # With one token left, vLLM would fill the row up with placeholders for drafts and assert that they stay;
            # a row that ends where its request is evicted has no room for them.
            self._longest_hit = min(self._longest_hit, request.num_tokens - 2)
        try:
            blocks, hit, resume_at, diverged = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        finally:
            limit, self._longest_hit = self._longest_hit, None
        if limit is not None:
            # Groups with windows or states cache only what precedes positions at which a later request may resume. Ours
            # resumes earlier than vLLM thinks, so we name that position, as vLLM itself does for shared prefixes; and
            # where a packing ends, for nobody begins with it without the others' caches.
            published_at = self.eviction_manager.resumes_at(request.request_id)
            resume_at = published_at or resume_at or limit // self.block_size * self.block_size
        self.eviction_manager.note_hit(request.request_id, hit)
        if self._answers is not None:
            self._last_hit = blocks.blocks[self.eviction_manager.kv_cache_group_id]
        return blocks, hit, resume_at, diverged

    def _ec_transfer_pending(self, request: Request, num_computed_tokens: int) -> bool:
        """vLLM's question whether a waiting request is passed over for now, while others behind it may come in."""
        if super()._ec_transfer_pending(request, num_computed_tokens):
            return True
        if num_computed_tokens or self._waits_for is None:
            return False
        self._parking.pass_over(self._waits_for, request)
        return True

    def get_request_counts(self) -> tuple[int, int]:
        """vLLM's, of those that run and those that wait, wherever they do."""
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._parking)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on the length of a chunk; ours is that it ends where the request is evicted."""
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        life = self._lives.get(request.request_id)
        if life is not None and life.phase is not PREFILL:  # nearly all, in every step
            if life.phase is ECHOING:
                return 0
            if life.is_echo:
                return min(num_new_tokens, self._echoes.most_tokens)
            return self._again.chunk(life, num_computed_tokens, num_new_tokens) if life.again else num_new_tokens
        stop = self.eviction_manager.next_stop(request.request_id)
        return min(num_new_tokens, max(stop - num_computed_tokens, 1)) if stop else num_new_tokens

    def _admits(self, request: Request) -> bool:
        """Whether the request has blocks already, or may have its first ones: where admission is steady, if none run,
        or if all that do, it included, are expected to fit into the pool until they end.

        Originals of a prefill under way, and blocks of sessions that wait for input, are left to vLLM's own gate.
        """
        blocks_of = self.eviction_manager.req_to_blocks
        if blocks_of.get(request.request_id):
            return True
        life = self.eviction_manager.life(request.request_id)
        if not self._echoes.lets_in(life):
            return False
        if self.running and self._again.starved:
            return False  # who is to give memory back comes first
        by_most = life is not None and life.again
        if not self.running or not (by_most or self._answers):
            return True
        # As answers grow, less is left of them, or more is held: who did not fit does not until one ends, a pin goes,
        # or the expectation changes.
        pinned = self.eviction_manager.lifecycle.library.pins.idle_blocks
        question = (request.request_id, len(self.running), pinned, self._answers.mean if self._answers else 0)
        if question == self._refused:
            return False
        if life is not None and by_most:
            lasting = self.eviction_manager.lasting_blocks
            admitted = self._again.lets_in(life, self.running, lambda other: lasting(other)[0])
            self._refused = () if admitted else question
            return admitted
        loads = [self._load(other, blocks_of.get(other.request_id, ())) for other in self.running]
        loads.append(self._load(request, self._last_hit))
        usable = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        usable -= pinned
        admitted = fits(loads, usable, self.eviction_manager.block_size)
        self._refused = () if admitted else question
        return admitted

    def _load(self, request: Request, blocks: Sequence[KVCacheBlock]) -> Load:
        """What the request asks of the pool. blocks: what it holds in place, or would find in the prefix cache."""
        assert self._answers is not None
        limit = min(request.max_tokens, self.max_model_len - request.num_prompt_tokens)
        rest = self._answers.rest(request.num_output_tokens, limit)
        lasting, leading = self.eviction_manager.lasting_blocks(request)
        life = self.eviction_manager.life(request.request_id)
        if life is not None and life.published is not None:  # which others may hold, too
            held = [block.block_id for part in life.published.line for block in part.blocks]
            own = lasting - len(held) + self.eviction_manager.outlook.blocks_beside(request.num_tokens + rest)
            return Load(rest, own, held)
        leading = min(leading, len(blocks))
        shared = self._shared_with_others(blocks, leading) if leading else 0
        own = lasting - shared + self.eviction_manager.outlook.blocks_beside(request.num_tokens + rest)
        return Load(rest, own, (blocks[i].block_id for i in range(shared - 1, -1, -1)) if shared else ())

    def _shared_with_others(self, blocks: Sequence[KVCacheBlock], leading: int) -> int:
        """Of so many leading blocks, how many others hold too, or would if the request in question were let in. These
        come first: who holds a block holds what precedes it."""
        hit = self._last_hit
        if blocks[0].ref_cnt < 2 and not (hit and blocks[0] is hit[0]):  # of nearly all requests
            return 0
        held = bisect_left(range(leading), True, key=lambda i: blocks[i].ref_cnt < 2)
        wanted = bisect_left(range(min(leading, len(hit))), True, key=lambda i: blocks[i] is not hit[i])
        return max(held, wanted)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        report = channels.read_report(model_runner_output)
        if report is not None:
            self._ledger.note_worker(report)
            if report.other_weights and not self._told_of_weights:
                self.eviction_manager.lifecycle.library.forget_all()
            for eviction in channels.read_message(scheduler_output).evictions if report.cancelled else ():
                if eviction.request_id in report.cancelled:
                    self.eviction_manager.cancel(eviction)
        self._told_of_weights = False  # what comes later is of another change
        hashed_tokens = self._amendments.hashed_tokens(scheduler_output.num_scheduled_tokens)
        self.eviction_manager.lifecycle.processed += 1  # a request that ends with this step has been packed in it
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._echoes.processed(outputs.values())
        for of_client in outputs.values():
            self._amendments.apply(of_client.outputs, hashed_tokens)
        for request in self._ended_at_once:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(empty_answer(request))
        self._ended_at_once.clear()
        return outputs

    def note_call(self, method: Any) -> None:
        """The workers were called by this name, or with a function."""
        if method in WEIGHT_CALLS:
            self.eviction_manager.lifecycle.library.forget_all()
            self._told_of_weights = True

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        """vLLM's; all blocks are to be free then, and an echo may hold some though it waits."""
        if reset_running_requests:
            self._echoes.end()
        self.eviction_manager.lifecycle.library.forget_all()
        return super().reset_prefix_cache(reset_running_requests, *args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._echoes.preempted(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's end of a request. A report that it asked for leaves with its last output, in the place for what a KV
        connector has to say: that goes into the responses that are not streams, and connectors are refused."""
        request_id, lifecycle = request.request_id, self.eviction_manager.lifecycle
        self.eviction_manager.publish_ended(request_id)
        report = lifecycle.report(request_id)
        said = request.num_output_tokens
        if self._answers is not None and request.status in _ENDED and request.max_tokens > 1 and said:
            self._answers.add(said)
        for_response, *others = super()._free_request(request, *args, **kwargs)
        lifecycle.forget(request_id)
        self.eviction_manager.outlook.forget(request_id)
        self._amendments.forget(request_id)
        self._parking.forget(request_id)
        self._echoes.freed(request)
        return (for_response if report is None else {KEY: report}), *others

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.num_running_reqs -= self._echoes.running  # nobody asked for these
            stats.num_waiting_reqs -= self._echoes.waiting
            lifecycle, pool = self.eviction_manager.lifecycle, self.kv_cache_manager.block_pool
            used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # block 0 is vLLM's null block
            library, totals = lifecycle.library, lifecycle.totals
            totals.published, totals.lost, totals.dropped = library.published, library.lost, library.dropped
            now = State(
                used_blocks=used,
                packed_blocks=lifecycle.packed_blocks,
                saved_blocks=lifecycle.saved_blocks,
                published=len(library),
                published_blocks=library.blocks,
                pinned_blocks=library.pins.blocks,
                stale_score=self._ledger.stale_score,
                publishes=self.eviction_manager.outlook.may_publish,
            )
            if (increase := self._ledger.take(totals, now, lifecycle.take_done())) is not None:
                channels.attach_counts(stats, increase)
        return stats


class EvictionScheduler(_EvictionMixin, Scheduler):
    """Synchronous scheduling with eviction."""


class EvictionAsyncScheduler(_EvictionMixin, AsyncScheduler):
    """Asynchronous scheduling with eviction."""


def _note_call(scheduler: Any, method: Any) -> None:
    if isinstance(scheduler, _EvictionMixin):
        scheduler.note_call(method)


def make_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """What vLLM calls as its scheduler class: the platform decides last whether scheduling is asynchronous."""
    contract.require("engine")
    vllm_config = kwargs["vllm_config"]
    assert from_vllm_config(vllm_config) is not None
    scheduling.patch_calls_of_workers(_note_call)
    scheduler_cls = EvictionAsyncScheduler if vllm_config.scheduler_config.async_scheduling else EvictionScheduler
    return scheduler_cls(*args, **kwargs)

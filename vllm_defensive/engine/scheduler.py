"""vLLM's schedulers, with a message for the workers on every output of which they must know."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_defensive.compat import channels
from vllm_defensive.engine.admission import ExpectedLength, Load, fits
from vllm_defensive.engine.kv_manager import EvictionBlockManager
from vllm_defensive.plan import WorkerReport
from vllm_defensive.serving import prometheus as metrics
from vllm_defensive.serving import status
from vllm_defensive.settings.engine import KEY, from_vllm_config

# An answer that ended by itself: its length says something of the next ones'.
_ENDED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION)


class _EvictionMixin(Scheduler):
    """The whole addition; it works the same on top of the sync and of the async scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        ours = [manager for manager in managers if isinstance(manager, EvictionBlockManager)]
        (self.eviction_manager,) = ours  # the workers have refused any other number
        self.eviction_manager.other_managers = [manager for manager in managers if manager is not ours[0]]
        self.eviction_manager.requests = self.requests
        # Set where admission is steady, and the blocks of the last hit in the prefix cache are then remembered.
        steady = self.eviction_manager.eviction.admission == "steady"
        self._answers = ExpectedLength(self.eviction_manager.block_size) if steady else None
        self._last_hit: Sequence[KVCacheBlock] = ()
        self._refused: tuple[Any, ...] = ()  # who was not let in, and what was looked at
        self._longest_hit: int | None = None
        self._reported = metrics.Totals()
        self._reported_pool = metrics.Pool()
        self._worker_report = WorkerReport()  # since the last statistics
        # Bounded, because nothing takes them out where statistics are off.
        self._evictions: deque[dict[str, Any]] = deque(maxlen=status.REMEMBERED)
        self._bound_prefix_cache()
        self._skip_settled_allocations()

    def _bound_prefix_cache(self) -> None:
        """P8, on this scheduler's coordinator. Why: what the prefix cache hands out and takes in has to be limited for
        all KV cache groups alike, and vLLM chooses the coordinator among several classes. How: two of its methods are
        replaced on the one object. Until: vLLM asks block managers for such limits."""
        manager = self.eviction_manager
        coordinator = self.kv_cache_manager.coordinator
        find, cache = coordinator.find_longest_cache_hit, coordinator.cache_blocks

        def find_longest_cache_hit(block_hashes: Any, max_cache_hit_length: int) -> Any:
            limit = max_cache_hit_length if self._longest_hit is None else min(max_cache_hit_length, self._longest_hit)
            return find(block_hashes, limit)

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            request_id = request.request_id
            if num_computed_tokens > manager.settled.get(request_id, 0) and request_id not in manager.hashed:
                cache(request, manager.cacheable_tokens(request_id, num_computed_tokens))

        coordinator.find_longest_cache_hit = find_longest_cache_hit
        coordinator.cache_blocks = cache_blocks

    def _skip_settled_allocations(self) -> None:
        """P9, on this scheduler's cache manager. Why: most decode steps write into a block that is there already, and
        vLLM walks through its block managers all the same, which takes a quarter of its time for such a step. How: a
        request that has its slots is not asked for them; with several KV cache groups nothing is ever settled, because
        windows slide. Until: vLLM skips such requests itself.

        Steady admission refuses here, too. It is where vLLM learns that the pool has no room, which is what is meant,
        and lets nobody else in during the step: no queue is walked through."""
        kv_cache, settled, settle = self.kv_cache_manager, self.eviction_manager.settled, self.eviction_manager.settle
        allocate, nothing = kv_cache.allocate_slots, kv_cache.empty_kv_cache_blocks

        def allocate_slots(
            request: Request, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **kwargs: Any
        ) -> Any:
            end = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
            if end <= settled.get(request.request_id, 0):
                return nothing
            if self._answers and not self._admits(request):
                return None
            blocks = allocate(request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens, **kwargs)
            settle(request.request_id)
            return blocks

        kv_cache.allocate_slots = allocate_slots

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.eviction_manager.release_processed()
        output = super().schedule(*args, **kwargs)
        message = self.eviction_manager.take_message(output.num_scheduled_tokens)
        self._evictions.extend(status.record_of(e, self.eviction_manager.block_size) for e in message.evictions)
        channels.attach_message(output, message)
        return output

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's lookup for a request about to be admitted, no longer than the block manager allows. From vLLM 0.33 on
        it is given a limit of its own, which is handed on: P8 takes the lesser of the two."""
        self._longest_hit = self.eviction_manager.longest_hit(request.request_id)
        if self._longest_hit is not None and self.num_spec_tokens:
            # With one token left, vLLM would fill the row up with placeholders for drafts and assert that they stay;
            # a row that ends where its request is evicted has no room for them.
            self._longest_hit = min(self._longest_hit, request.num_tokens - 2)
        try:
            blocks, hit, resume_at, diverged = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        finally:
            limit, self._longest_hit = self._longest_hit, None
        if limit is not None and not resume_at:
            # Sliding-window groups cache only the blocks before positions at which a later request may resume. Ours
            # resumes earlier than vLLM thinks, so we name that position, as vLLM itself does for shared prefixes.
            resume_at = limit // self.block_size * self.block_size
        if limit is not None:
            self.eviction_manager.note_hit(request.request_id, hit)
        if self._answers is not None:
            self._last_hit = blocks.blocks[self.eviction_manager.kv_cache_group_id]
        return blocks, hit, resume_at, diverged

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on the length of a chunk; ours is that it ends where the request is evicted."""
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.request_id in self.eviction_manager.decided:
            return num_new_tokens
        stop = self.eviction_manager.next_stop(request.request_id)
        return min(num_new_tokens, stop - num_computed_tokens) if stop else num_new_tokens

    def _admits(self, request: Request) -> bool:
        """Whether the request has blocks already, or may have its first ones: if none run, or if all that do, it
        included, are expected to fit into the pool until they end.

        Originals of a prefill under way, and blocks of sessions that wait for input, are left to vLLM's own gate.
        """
        assert self._answers is not None
        blocks_of = self.eviction_manager.req_to_blocks
        if blocks_of.get(request.request_id) or not self.running:
            return True
        # As answers grow, less is left of them: who did not fit does not until one ends, or the expectation changes.
        question = (request.request_id, len(self.running), self._answers.mean)
        if question == self._refused:
            return False
        loads = [self._load(other, blocks_of.get(other.request_id, ())) for other in self.running]
        loads.append(self._load(request, self._last_hit))
        usable = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        admitted = fits(loads, usable, self.eviction_manager.block_size)
        self._refused = () if admitted else question
        return admitted

    def _load(self, request: Request, blocks: Sequence[KVCacheBlock]) -> Load:
        """What the request asks of the pool. blocks: what it holds in place, or would find in the prefix cache."""
        assert self._answers is not None
        limit = min(request.max_tokens, self.max_model_len - request.num_prompt_tokens)
        rest = self._answers.rest(request.num_output_tokens, limit)
        lasting, shared = self.eviction_manager.lasting_blocks(request)
        leading = min(shared, len(blocks))
        own = lasting - leading + self.eviction_manager.blocks_beside(request.num_tokens + rest)
        return Load(rest, own, (blocks[i].block_id for i in range(leading - 1, -1, -1)))

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        report = channels.read_report(model_runner_output)
        if report is not None:
            # vLLM hands on the first rank's output only. Each rank packs as many pages as that one.
            ranks = self.vllm_config.parallel_config.tensor_parallel_size
            self._worker_report.add(report.microseconds, [pages * ranks for pages in report.decile_pages])
        return super().update_from_output(scheduler_output, model_runner_output)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's end of a request. A report that it asked for leaves with its last output, in the place for what a KV
        connector has to say: that goes into the responses that are not streams, and connectors are refused."""
        report = self.eviction_manager.report(request.request_id)
        if self._answers is not None and request.status in _ENDED and request.max_tokens > 1:
            self._answers.add(request.num_output_tokens)
        for_response, *others = super()._free_request(request, *args, **kwargs)
        return (for_response if report is None else {KEY: report}), *others

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            totals = self.eviction_manager.totals
            if totals != self._reported:
                metrics.attach(stats, totals - self._reported)
                self._reported = replace(totals)
            if self._worker_report:
                metrics.attach_worker(stats, self._worker_report)
                self._worker_report = WorkerReport()
            metrics.attach_records(stats, self._evictions)
            self._evictions.clear()
            self._attach_pool(stats)
        return stats

    def _attach_pool(self, stats: Any) -> None:
        pool = self.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # block 0 is vLLM's null block
        now = metrics.Pool(used, self.eviction_manager.packed_blocks, self.eviction_manager.saved_blocks)
        if now != self._reported_pool:
            metrics.attach_pool(stats, now)
            self._reported_pool = now


class EvictionScheduler(_EvictionMixin, Scheduler):
    """Synchronous scheduling with eviction."""


class EvictionAsyncScheduler(_EvictionMixin, AsyncScheduler):
    """Asynchronous scheduling with eviction."""


def make_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """What vLLM calls as its scheduler class: the platform decides last whether scheduling is asynchronous."""
    vllm_config = kwargs["vllm_config"]
    assert from_vllm_config(vllm_config) is not None
    scheduler_cls = EvictionAsyncScheduler if vllm_config.scheduler_config.async_scheduling else EvictionScheduler
    return scheduler_cls(*args, **kwargs)

"""Who owns which block, from a request's first chunk to its end.

    when                              positional blocks of the request         packed blocks
    prefill                           own all `ceil(tokens / N)`               none
    the allocation that reaches `T`   own all                                  take `K` fresh ones, plan the eviction
    that step has been processed      `[s, g)` go back to the pool, null       own `K`
                                      blocks keep their positions
    decode                            own `[0, s)` and from `g` on             own `K`
    finish, abort, preempt            give back all                            give back all

The originals that go back keep their hashes: vLLM's prefix cache can hand them out for as long as nobody needs the
memory. Blocks that are filled after the eviction are never hashed, because what is in them was computed from an evicted
context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_defensive.engine.lifecycle import RequestState
from vllm_defensive.engine.sharing import worth_sharing
from vllm_defensive.plan import Eviction, StepMessage, kept_tokens
from vllm_defensive.policy import PRESETS
from vllm_defensive.serving.prometheus import Totals
from vllm_defensive.settings.engine import NONE, EvictionConfig
from vllm_defensive.settings.request import RequestSettings, settings_or_none


class EvictionBlockManager(FullAttentionManager):
    """vLLM's full-attention block manager, with the life cycle in the table above."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.eviction: EvictionConfig = kv_cache_spec.eviction
        # The scheduler's own dict of live requests, set by it: block hashes and lengths are read from there. Without it
        # (a manager used on its own) nothing is ever evicted.
        self.requests: Mapping[str, Request] = {}
        # Block managers of the model's other KV cache groups, set by the scheduler: they take from the same pool.
        self.other_managers: Sequence[SingleTypeKVCacheManager] = ()
        self.totals = Totals()
        self.saved_blocks = 0  # sum over the live requests that were released
        self.packed_blocks = 0  # sum over all live requests
        self._states: dict[str, RequestState] = {}
        # Sets, because they are asked for every request of every step. Live requests that will never (again) be
        # evicted, and those evicted of which the prefix cache has every block that it may have.
        self.decided: set[str] = set()
        self.hashed: set[str] = set()
        # Tokens up to which a request, waiting for nothing, has slots, and no block left to hash.
        self.settled: dict[str, int] = {}
        self._prefilling: set[str] = set()  # still to reach their `T`
        self._unreleased: set[str] = set()  # evicted, originals not yet given back
        # What is planned for requests without an allocation, since the last look into the prefix cache for them.
        self._waiting: dict[str, RequestState] = {}
        self._planned: dict[str, Eviction] = {}
        self._hit_tokens: dict[str, int] = {}  # from the prefix cache, of requests still to be evicted

    # -- allocation ---------------------------------------------------------------------------------------------------

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Blocks this allocation takes from the pool, the packed ones included. Feeds vLLM's admission gate as well."""
        positional = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            *args,
            **kwargs,
        )
        if request_id in self.decided:
            return positional
        return positional + self._plan(request_id, num_tokens_main_model)[1]

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Blocks appended to the request's table. The packed blocks are not among them: no position maps to them."""
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if request_id in self.decided:
            return new_blocks
        state = self._state(request_id)
        if state is None:
            return new_blocks
        if self._waiting.pop(request_id, None) is not None:
            self._states[request_id] = state
            if not state.decided:
                self._prefilling.add(request_id)
        shared, count = self._plan(request_id, num_tokens_main_model)
        state.decided = state.decided or num_tokens_main_model >= state.num_tokens
        if state.decided:
            self.decided.add(request_id)
        if count:
            assert num_tokens_main_model == state.num_tokens, "the scheduler ends a chunk where a request is evicted"
            self._start_eviction(request_id, state, shared, count)
        return new_blocks

    def _start_eviction(self, request_id: str, state: RequestState, shared: int, count: int) -> None:
        state.shared_blocks, state.full_blocks = shared, state.num_tokens // self.block_size
        state.packed = self.block_pool.get_new_blocks(count)
        self.packed_blocks += count
        self._unreleased.add(request_id)
        blocks = self.req_to_blocks[request_id][: cdiv(state.num_tokens, self.block_size)]
        token_ids = None
        if self.eviction.audit is not None:
            token_ids = tuple(self.requests[request_id].all_token_ids[: state.num_tokens])
        self._planned[request_id] = Eviction(
            request_id=request_id,
            policy=state.settings.policy,
            keep=state.settings.keep,
            num_tokens=state.num_tokens,
            shared_blocks=shared,
            source_blocks=tuple(block.block_id for block in blocks),
            packed_blocks=tuple(block.block_id for block in state.packed),
            token_ids=token_ids,
        )

    def _state(self, request_id: str) -> RequestState | None:
        """The request's state, from its first allocation or from what waits for that; None if we do not know it."""
        state = self._states.get(request_id) or self._waiting.get(request_id)
        if state is None and (request := self.requests.get(request_id)) is not None:
            state = self._waiting[request_id] = self._foresee(request)
        return state

    def _foresee(self, request: Request) -> RequestState:
        """The state that a request without blocks begins with."""
        settings = settings_or_none(self.eviction, request)
        num_tokens = request.num_prompt_tokens if settings.boundary is None else settings.boundary
        # A prefill yields the answer's first token: if no other is asked for (a classifier, a beam search step),
        # nobody reads what is kept, unless an audit shows it.
        fleeting = request.max_tokens == 1 and request.num_prompt_tokens == num_tokens and not request.resumable
        pointless = fleeting and self.eviction.audit is None
        count = 0 if pointless else self._packed(num_tokens, settings)
        # Originals and packed blocks exist side by side for one step. A request for which the whole pool would not do
        # is served without eviction: to refuse it, or to let it wait for ever, would be worse.
        needed = cdiv(request.num_tokens, self.block_size) + count + self.blocks_beside(request.num_tokens)
        fits = needed < self.block_pool.num_gpu_blocks
        return RequestState(num_tokens, settings, decided=not (count and fits), fleeting=fleeting)

    def blocks_beside(self, num_tokens: int) -> int:
        """Blocks that a request of so many tokens takes in the other KV cache groups."""
        return sum(
            other.get_num_blocks_to_allocate("", num_tokens, [], 0, 0, num_tokens, apply_admission_cap=True)
            for other in self.other_managers
        )

    def _packed(self, num_tokens: int, settings: RequestSettings, shared_blocks: int = 0) -> int:
        """`K` for a request evicted at `num_tokens`; 0 if it is left alone."""
        protected = cdiv(settings.protect, self.block_size)
        shared_blocks = max(shared_blocks, min(protected, num_tokens // self.block_size))
        return self.eviction.packed_blocks(num_tokens, shared_blocks, self.block_size, settings.policy, settings.keep)

    def _plan(self, request_id: str, num_tokens_main_model: int) -> tuple[int, int]:
        """(`s`, `K`) if the allocation up to `num_tokens_main_model` reaches `T` and evicts, else (0, 0)."""
        state = self._state(request_id)
        if state is None or state.decided or num_tokens_main_model < state.num_tokens:
            return 0, 0
        full_blocks = state.num_tokens // self.block_size
        shared = min(cdiv(state.settings.protect, self.block_size), full_blocks)
        if self.eviction.shared == "keep" and not state.accumulates:
            shared = max(shared, self._worth_sharing(request_id, state.settings.keep, full_blocks))
        return shared, self._packed(state.num_tokens, state.settings, shared)

    def _worth_sharing(self, request_id: str, keep: float, full_blocks: int) -> int:
        if not self.enable_caching or self.block_size != self.block_pool.hash_block_size:
            return 0
        return worth_sharing(self.requests[request_id], keep, full_blocks, self.block_size, self.requests, self._state)

    def settle(self, request_id: str) -> None:
        """Note, after an allocation, up to where the request's next ones have nothing to do."""
        if self.other_managers or request_id in self._unreleased or request_id not in self.decided:
            return
        tokens = len(self.req_to_blocks[request_id]) * self.block_size
        if self.enable_caching and request_id not in self.hashed:
            tokens = min(tokens, (self.num_cached_block.get(request_id, 0) + 1) * self.block_size - 1)
        self.settled[request_id] = tokens

    # -- release ------------------------------------------------------------------------------------------------------

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give the originals back once the step that evicted them has been processed."""
        del num_prompt_tokens
        if request_id in self._unreleased:  # few, and this runs for every request of every step
            self.release(request_id, processed_computed_tokens)

    def release(self, request_id: str, processed_tokens: int) -> None:
        """Free blocks `[s, g)` if `processed_tokens`, tokens whose step is over, cover the whole prefill."""
        if request_id not in self._unreleased or processed_tokens < self._states[request_id].num_tokens:
            return
        state = self._states[request_id]
        self._remove_blocks_in_range(request_id, state.shared_blocks, state.full_blocks)
        self._unreleased.discard(request_id)
        self.totals.freed_blocks += state.saved_blocks
        self.saved_blocks += state.saved_blocks

    def release_processed(self) -> None:
        """Release every request that is due, before anybody is scheduled or preempted for want of the memory."""
        for request_id in list(self._unreleased):
            request = self.requests[request_id]
            self.release(request_id, request.num_computed_tokens - request.num_in_flight_tokens)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Everything the request holds: the one way out for finish, abort and preemption."""
        if self.is_released(request_id):
            self.saved_blocks -= self._states[request_id].saved_blocks
        state = self._states.pop(request_id, None)
        if state is not None:
            self.packed_blocks -= len(state.packed)
        self._planned.pop(request_id, None)
        self._hit_tokens.pop(request_id, None)
        self.decided.discard(request_id)
        self.hashed.discard(request_id)
        self.settled.pop(request_id, None)
        self._prefilling.discard(request_id)
        self._unreleased.discard(request_id)
        self._waiting.pop(request_id, None)
        blocks = super().pop_blocks_for_free(request_id)
        return blocks + state.packed if state is not None else blocks

    # -- for the scheduler --------------------------------------------------------------------------------------------

    def take_message(self, num_scheduled_tokens: Mapping[str, int]) -> StepMessage:
        """What the workers must know of the step that was just scheduled.

        num_scheduled_tokens: tokens of each request in the step; `request.num_computed_tokens` includes them already.
        Evictions planned for a request that was preempted later in the same pass are gone by now.
        """
        message = StepMessage(evictions=list(self._planned.values()))
        self._planned = {}
        for eviction in message.evictions:
            self._count(eviction)
        for request_id in [r for r in self._prefilling if r in num_scheduled_tokens]:
            num_tokens, end = self._states[request_id].num_tokens, self.requests[request_id].num_computed_tokens
            if PRESETS[self._states[request_id].settings.policy].accumulates:
                message.accumulate[request_id] = num_tokens
            elif end > num_tokens - self.eviction.window:
                message.observe[request_id] = num_tokens
            if end >= num_tokens:
                self._prefilling.discard(request_id)
        return message

    def _count(self, eviction: Eviction) -> None:
        self.totals.requests += 1
        self.totals.prefix_hit_tokens += self._hit_tokens.pop(eviction.request_id, 0)
        self.totals.prompt_tokens += eviction.num_tokens
        whole_blocks = eviction.shared_blocks + len(eviction.packed_blocks)
        self.totals.kept_tokens += kept_tokens(eviction.num_tokens, whole_blocks, self.block_size)

    def cacheable_tokens(self, request_id: str, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens may be hashed: none of a block filled after the eviction."""
        state = self._states.get(request_id)
        if state is None or not state.full_blocks:
            return num_tokens
        limit = state.full_blocks * self.block_size
        if num_tokens >= limit:
            self.hashed.add(request_id)
        return min(num_tokens, limit)

    def longest_hit(self, request_id: str) -> int | None:
        """Tokens that the prefix cache may serve to a request about to be admitted; None: as many as it has.

        A hit leaves at least the observation window to be computed (all of the prompt, if the policy accumulates),
        since nobody caches queries, unless there is nothing to evict (all whole blocks are shared, say). That is
        settled here, because queries that were not computed cannot be had later.
        """
        self._waiting.pop(request_id, None)  # it may have grown since the last time
        state = self._state(request_id)
        if state is None or state.decided:
            return None
        stop = state.num_tokens
        if not self._plan(request_id, stop)[1]:
            state.decided = True
            return None
        return 0 if state.accumulates else max(0, stop - self.eviction.window)

    def note_hit(self, request_id: str, num_tokens: int) -> None:
        """The prefix cache serves so many tokens to a request that is still to be evicted, if it is admitted now."""
        self._hit_tokens[request_id] = num_tokens

    def next_stop(self, request_id: str) -> int:
        """`T` of a request that is still to be evicted: no chunk may run past it. 0 for all others."""
        state = self._state(request_id)
        return 0 if state is None or state.decided else state.num_tokens

    def lasting_blocks(self, request: Request) -> tuple[int, int]:
        """Blocks that the request holds, or would if it were let in, at its present length and once its originals are
        released; and how many of them are leading ones, in place."""
        whole = cdiv(request.num_tokens, self.block_size)
        state = self._state(request.request_id)
        if state is None:
            return whole, whole
        full, shared, packed = state.full_blocks, state.shared_blocks, len(state.packed)
        if not state.decided:
            full = state.num_tokens // self.block_size
            shared, packed = self._plan(request.request_id, state.num_tokens)
        return (whole - full + shared + packed, shared) if packed else (whole, whole)

    def is_released(self, request_id: str) -> bool:
        """Whether the request was evicted and its originals have gone back to the pool."""
        state = self._states.get(request_id)
        return state is not None and state.full_blocks > 0 and request_id not in self._unreleased

    def report(self, request_id: str) -> dict[str, Any] | None:
        """For the response of a request that asks for it: its policy, and tokens of its whole prompt, all and kept (a
        mean over layers and heads)."""
        state = self._states.get(request_id)
        if state is None or not state.settings.report:
            return None
        prompt = self.requests[request_id].num_prompt_tokens
        if not state.full_blocks:
            return {"policy": NONE, "prompt_tokens": prompt, "kept_tokens": prompt}
        dropped = state.num_tokens - kept_tokens(
            state.num_tokens, state.shared_blocks + len(state.packed), self.block_size
        )
        return {"policy": state.settings.policy, "prompt_tokens": prompt, "kept_tokens": prompt - dropped}

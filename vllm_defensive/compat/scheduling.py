"""What the scheduler's process needs of vLLM's insides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vllm_defensive.compat.base import patch


def register_spec(spec_cls: type, manager_cls: type, base: type) -> None:
    """Make `manager_cls` the block manager of groups whose spec is `spec_cls`.

    The registry fills itself only while it is empty, so it must have been filled before anything of ours goes in.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec_cls, manager_cls, uniform_type_base_spec=base)


def patch_calls_of_workers(note: Callable[[Any, Any], None]) -> None:
    """P10, installed where a scheduler of ours is made. Why: a call that gives the workers other weights passes the
    scheduler by, which would hear of it with the answer to the next step, and let requests begin with what older
    weights have left in that one. How: `note(scheduler, method)` after each call. Until: vLLM tells its scheduler."""
    from vllm.v1.engine.core import EngineCore

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(self, method, *args, **kwargs)
            finally:
                note(getattr(self, "scheduler", None), method)  # an engine that is being made has none yet

        return collective_rpc

    patch(EngineCore, "collective_rpc", make)


class Noted(Protocol):
    """What is known of a request that has blocks; these few lines run for each request of each step."""

    ready_tokens: int
    """Up to here it has slots, and no block is left to hash."""
    cached: bool
    """The prefix cache has every block of it that it may have."""


def bound_prefix_cache(
    coordinator: Any,
    longest_hit: Callable[[], int | None],
    noted: Mapping[str, Noted],
    cacheable_tokens: Callable[[str, int], int],
) -> None:
    """P8, on one scheduler's coordinator. Why: what the prefix cache hands out and takes in has to be limited for all
    KV cache groups alike, and vLLM chooses the coordinator among several classes. How: two of its methods are replaced
    on the one object. Until: vLLM asks block managers for such limits.

    longest_hit: tokens that the present look-up may find, None for no limit. noted: by request id. cacheable_tokens: of
    a request and its computed tokens, how many may be hashed.
    """
    find, cache = coordinator.find_longest_cache_hit, coordinator.cache_blocks

    def find_longest_cache_hit(block_hashes: Any, max_cache_hit_length: int, *args: Any, **kwargs: Any) -> Any:
        limit = longest_hit()
        longest = max_cache_hit_length if limit is None else min(max_cache_hit_length, limit)
        return find(block_hashes, longest, *args, **kwargs)

    def cache_blocks(request: Any, num_computed_tokens: int, *args: Any, **kwargs: Any) -> None:
        note = noted.get(request.request_id)
        if note is not None:
            if note.cached or num_computed_tokens <= note.ready_tokens:
                return
            num_computed_tokens = cacheable_tokens(request.request_id, num_computed_tokens)
        cache(request, num_computed_tokens, *args, **kwargs)

    coordinator.find_longest_cache_hit = find_longest_cache_hit
    coordinator.cache_blocks = cache_blocks


def bound_allocations(
    kv_cache: Any,
    noted: Mapping[str, Noted],
    admits: Callable[[Any], bool],
    note_ready: Callable[[str], None],
    note_refused: Callable[[str], None],
) -> None:
    """P9, on one scheduler's cache manager. Why: most decode steps write into a block that is there already, and vLLM
    walks through its block managers all the same, which takes a quarter of its time for such a step; and nobody asks us
    who is let in. How: a request that has its slots is not asked for them; one that may not come in yet gets none, from
    which vLLM takes that the pool has no room, which is what is meant, and lets nobody else in during the step. Until:
    vLLM skips such requests itself, and has a hook for admission.

    noted: by request id. admits: whether a request may have blocks, if it is new. note_ready: is told of each
    allocation, and of whose. note_refused: of each that found no memory.
    """
    allocate, nothing = kv_cache.allocate_slots, kv_cache.empty_kv_cache_blocks

    def allocate_slots(
        request: Any, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **kwargs: Any
    ) -> Any:
        note = noted.get(request.request_id)
        end = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        if note is not None and end <= note.ready_tokens:
            return nothing
        if not admits(request):
            return None
        blocks = allocate(request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens, **kwargs)
        (note_refused if blocks is None else note_ready)(request.request_id)
        return blocks

    kv_cache.allocate_slots = allocate_slots

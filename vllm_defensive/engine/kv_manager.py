"""vLLM's full-attention block manager, for requests that live as `lifecycle.py` says.

The originals that go back keep their hashes: vLLM's prefix cache can hand them out for as long as nobody needs the
memory. Blocks that are filled after the eviction are never hashed, because what is in them was computed from an evicted
context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_defensive.engine.again import Again
from vllm_defensive.engine.life import Life, Phase
from vllm_defensive.engine.lifecycle import Lifecycle
from vllm_defensive.engine.outlook import Outlook
from vllm_defensive.engine.pressure import Pressure
from vllm_defensive.engine.published import Key, Published
from vllm_defensive.packing import Region
from vllm_defensive.plan import Eviction
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.settings.request import UNPIN, only_unpins


class EvictionBlockManager(FullAttentionManager):
    """vLLM's hooks, each handed on to the life cycle."""

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.eviction: EvictionConfig = kv_cache_spec.eviction
        settings, audited = self.eviction, self.eviction.audit is not None
        self.lifecycle = Lifecycle(settings.window, audited, self.block_pool, settings.pinned)
        can_share = self.enable_caching and self.block_size == self.block_pool.hash_block_size
        page, block_tokens = kv_cache_spec.page, self.block_size
        self.outlook = Outlook(self.eviction, page, block_tokens, self.block_pool, self.lifecycle.library, can_share)
        self.again = Again(self.lifecycle, self.outlook, self.block_pool, self.req_to_blocks)
        self.pressure = Pressure(self.lifecycle, self.outlook, self.block_pool, self.again, self.req_to_blocks)
        # The scheduler's own dict of live requests, set by it. Without it (a manager used on its own) nothing is ever
        # evicted.
        self.requests: Mapping[str, Request] = {}

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
        life = self.life(request_id)
        if life is None:
            return positional
        if life.bounded and kwargs.get("apply_admission_cap"):
            positional = min(positional, self.again.caps(life))
        elif life.ahead and life.published is not None:
            positional += life.published.unheld
        elif life.ahead and not life.full and num_tokens_main_model >= life.stop:
            positional += self.plan(life)[1]
        return positional if request_id in self.lifecycle.lives else self.pressure.ask(life, positional)

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """A request's first blocks, before any is taken from the pool for it."""
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        if (growth := self.lifecycle.adopt(request_id)) is not None:
            blocks = self.req_to_blocks[request_id]
            blocks[len(blocks) - len(growth) :] = growth

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Blocks appended to the request's table. The packed blocks are not among them: no position maps to them."""
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        life = self.life(request_id)
        if life is None:
            return new_blocks
        if request_id not in self.lifecycle.lives:
            self.pressure.admit(life)
        self.lifecycle.admit(request_id)
        self.outlook.relatives.add(life.request)  # if its first block has filled up only now
        self.again.note(life, num_tokens_main_model)
        if life.ahead and num_tokens_main_model >= life.stop:
            self._reach_stop(life, num_tokens_main_model)
        return new_blocks

    def _reach_stop(self, life: Life, num_tokens: int) -> None:
        if life.full:
            self.lifecycle.ripen(life)
            return
        region, count = self.plan(life)
        # The scheduler ends a chunk at the stop; of one that ran past it, too much has been seen to be evicted there.
        if not count or num_tokens != life.stop:
            self.lifecycle.stay_whole(life)
            return
        blocks = self.req_to_blocks[life.request.request_id][: cdiv(life.stop, self.block_size)]
        packed = self.block_pool.get_new_blocks(count)
        format = self.outlook.format(life.settings)
        self.lifecycle.pack(life, region, packed, [block.block_id for block in blocks], format)

    def life(self, request_id: str) -> Life | None:
        """The request's life, or its outlook before it has blocks; None if we do not know the request."""
        life = self.lifecycle.get(request_id)
        if life is None and (request := self.requests.get(request_id)) is not None:
            life = self._foresee(request)
        return life

    def _foresee(self, request: Request) -> Life:
        blocks_of = self.req_to_blocks
        life = self.outlook.foresee(request, lambda request_id: blocks_of.get(request_id, ()))
        self.again.expect(life)
        if life.full and life.ahead and life.settings.answers == "evict":
            life.turn(Phase.WHOLE)  # its end is where it is then
        self.lifecycle.waiting[request.request_id] = life
        return life

    def plan(self, life: Life) -> tuple[Region, int]:
        """What an eviction of a request whose stop lies ahead would choose from now, and `K`; 0: it is not worth it."""
        return self.outlook.plan(life, self._life_of)

    def _life_of(self, request: Request) -> Life:
        return self.lifecycle.get(request.request_id) or self._foresee(request)

    def note_ready(self, request_id: str) -> None:
        """Note, after an allocation, up to where the request's next ones have nothing to do."""
        life = self.lifecycle.lives.get(request_id)
        if self.outlook.other_managers or life is None or life.phase not in (Phase.PACKED, Phase.WHOLE):
            return
        tokens = len(self.req_to_blocks[request_id]) * self.block_size
        if self.enable_caching and not life.cached:
            tokens = min(tokens, (self.num_cached_block.get(request_id, 0) + 1) * self.block_size - 1)
        life.ready_tokens = min(tokens, life.looked_at_from) if life.again else tokens

    # -- release ------------------------------------------------------------------------------------------------------

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give the originals back once the step that evicted them has been processed."""
        del num_prompt_tokens
        if request_id in self.lifecycle.packing:  # few, and this runs for every request of every step
            self._release(request_id, processed_computed_tokens)

    def release_processed(self) -> None:
        """Release every request that is due, before anybody is scheduled or preempted for want of the memory."""
        for request_id, life in list(self.lifecycle.packing.items()):
            self._release(request_id, life.request.num_computed_tokens - life.request.num_in_flight_tokens)

    def _release(self, request_id: str, processed_tokens: int) -> None:
        life = self.lifecycle.packing[request_id]
        if processed_tokens >= life.stop and self.lifecycle.processed >= life.fence:
            region, former = self.lifecycle.release(life), life.former
            if life.published is None or former is not None:
                first = region.shared_blocks if former is None else former.region.full_blocks
                self._remove_blocks_in_range(request_id, first, region.full_blocks)
                if former is not None:
                    self.block_pool.free_blocks(self.lifecycle.take_replaced(life))
                return
            blocks = self.req_to_blocks[request_id]
            originals = blocks[region.full_blocks - 1 :: -1]
            blocks[: region.full_blocks] = [self._null_block] * region.full_blocks
            self.lifecycle.library.free_originals(originals)

    def cancel(self, eviction: Eviction) -> None:
        """The workers could not carry this eviction out: the request goes on over its originals."""
        self.block_pool.free_blocks(self.lifecycle.cancel(eviction))
        if (life := self.lifecycle.lives.get(eviction.request_id)) is not None:
            self.again.postpone(life)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Everything the request holds: the one way out for finish, abort and preemption."""
        self.publish_ended(request_id)
        life = self.lifecycle.lives.get(request_id)
        if life is not None and life.published is not None and life.settings.reuse == "chat":
            self._leave_end(life, life.published)
        packed = self.lifecycle.end(request_id)
        blocks = super().pop_blocks_for_free(request_id)
        if life is not None and life.published is not None:  # they are the library's
            del blocks[life.stop // self.block_size : life.published.end // self.block_size]
        return blocks + packed

    def publish_ended(self, request_id: str) -> None:
        """A request ends, perhaps with the very step that packed it: its packing is for others."""
        life = self.lifecycle.packing.get(request_id)
        if life is not None and life.key is not None and life.former is None:
            self._release(request_id, life.request.num_computed_tokens - life.request.num_in_flight_tokens)

    def _leave_end(self, life: Life, held: Published) -> None:
        """A turn of a chat ends: what it computed behind what it holds is there for the next one, whole blocks. Not
        where there are other groups: what is computed over a packing is not hashed, nor found, in theirs."""
        request = life.request
        if self.outlook.other_managers:
            return
        full = (request.num_computed_tokens - request.num_in_flight_tokens) // self.block_size
        full = min(full, len(request.block_hashes))
        blocks = self.req_to_blocks[request.request_id][held.end // self.block_size : full]
        if blocks:
            hashed = request.block_hashes[full - 1]
            life.published = self.lifecycle.library.extend(held, hashed, full * self.block_size, blocks)

    # -- for the scheduler --------------------------------------------------------------------------------------------

    def look_anew(self, request_id: str) -> None:
        """A request is about to be looked at that has no blocks: it may have grown since the last time."""
        self.lifecycle.waiting.pop(request_id, None)

    def longest_hit(self, request_id: str) -> int | None:
        """Tokens that the prefix cache may serve to a request about to be admitted; None: as many as it has.

        A hit leaves at least the observation window to be computed (all of the prompt, if the policy accumulates),
        since nobody caches queries, unless there is nothing to evict (all whole blocks are shared, say). That is
        fixed here, because queries that were not computed cannot be had later. A policy that goes by a second pass
        alone, seen or foretold, leaves hits as they are, but for the last token, whose step is the one that evicts.
        """
        life = self.life(request_id)
        if life is None:
            return None
        if life.ahead and not life.full and not self.plan(life)[1]:
            life.turn(Phase.WHOLE)
        if life.ahead and (life.reads_window or not life.full):
            return 0 if life.accumulates else max(0, life.stop - (self.eviction.window if life.reads_window else 1))
        # What comes behind its next stop is read in parts, by one that was preempted, or whose prompt is bounded.
        in_parts = life.again and life.request.num_tokens > life.looked_at_from
        return max(0, life.looked_at_from) if in_parts else None

    def unpin(self, request: Request) -> bool:
        """Take back the pin of what a request that has just come would begin with, if it asks for nothing else. Returns
        whether it does: nothing is to be computed for it, whether the packing is there or was lost."""
        if request.sampling_params is None or not only_unpins(request.sampling_params.extra_args):
            return False
        life = self.life(request.request_id)
        if life is None or life.settings.pin != UNPIN:
            return False
        if life.key is not None and (there := self.lifecycle.library.find(life.key)) is not None:
            self.lifecycle.library.pins.drop(there)
        return True

    def resumes_at(self, request_id: str) -> int:
        """Where later requests will begin with what this one, which is about to be admitted, packs; 0: nowhere."""
        life = self.lifecycle.get(request_id)
        return life.stop if life is not None and life.ahead and life.key is not None else 0

    def adoptable(self, request: Request, at_least: int) -> tuple[int, Mapping[int, list[KVCacheBlock]]] | None:
        """Tokens that a packing of an earlier request stands for, to one about to be admitted, and by KV cache group
        the blocks that it begins with in vLLM's tables; None: there is none. at_least: so many tokens of a request must
        be left to compute."""
        life = self.life(request.request_id)
        if life is None or not life.ahead:
            return None
        for found in self.outlook.may_begin_with(life, at_least):
            if (others := self.outlook.windows_before(request, found.end)) is not None:
                life.published = found
                others[self.kv_cache_group_id] = [self._null_block] * (found.end // self.block_size)
                return found.end, others
        if not life.fits:
            self.lifecycle.stay_whole(life)
        return None

    def waits_for(self, request: Request, at_least: int) -> Key | None:
        """What another request is packing, and this one, which is about to be admitted, would begin with. at_least: as
        in `adoptable`."""
        life = self.life(request.request_id)
        if life is None or not life.ahead or life.key is None or request.skip_reading_prefix_cache:
            return None
        waits = request.num_tokens - life.stop >= at_least and self.lifecycle.is_being_packed(life.key)
        return life.key if waits else None

    def makes_way_for(self, request: Request) -> Key | None:
        """What another request is packing, if this one, which would pack as well, finds memory beside it only in place
        of packings that are there: of documents that are read at once, all originals would have to be there at once."""
        life = self.life(request.request_id)
        if life is None or not life.ahead or life.key is None:
            return None
        if (first := next(iter(self.lifecycle.packers), None)) is None:
            return None
        if request.priority < self.lifecycle.lives[self.lifecycle.packers[first]].request.priority:
            return None
        needed = self.outlook.blocks_to_pack(life)
        for request_id in self.lifecycle.packers.values():
            packer = self.lifecycle.lives[request_id]
            needed += max(
                0, self.outlook.blocks_to_pack(packer) - len(self.req_to_blocks[request_id]) - len(packer.blocks)
            )
        there = self.block_pool.get_num_free_blocks() - self.lifecycle.library.unheld_blocks
        return first if needed > there else None

    def note_hit(self, request_id: str, num_tokens: int) -> None:
        """The prefix cache serves so many tokens to a request that is still to be evicted, if it is admitted now."""
        if (life := self.lifecycle.get(request_id)) is not None:
            life.hit_tokens = num_tokens

    def next_stop(self, request_id: str) -> int:
        """The stop of a request that is still to be evicted: no chunk may run past it. 0 for all others."""
        life = self.life(request_id)
        if life is None or life.published is not None or life.full:
            return 0
        return life.stop if life.ahead else life.again

    def lasting_blocks(self, request: Request) -> tuple[int, int]:
        """Blocks that the request holds, or would if it were let in, at its present length and once its originals are
        released; and how many of them are leading ones, in place."""
        whole = cdiv(request.num_tokens, self.block_size)
        life = self.life(request.request_id)
        if life is not None and (packing := life.packing) is not None:  # of nearly all that run
            return whole - packing.saved_blocks, packing.region.shared_blocks
        if life is not None and life.published is not None:
            return whole - life.published.eviction.packing.saved_blocks, 0  # of its packing, and all behind it
        if life is None or not (life.ahead or request.request_id in self.lifecycle.ripe):
            return whole, whole
        region, packed = self.plan(life)
        return (whole - region.blocks + packed, region.shared_blocks) if packed else (whole, whole)

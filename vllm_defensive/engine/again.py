"""Requests that are evicted more than once: when, how many blocks that takes, and that it is in nobody's way.

One whose answers are evicted is looked at each time that it has generated `interval` more tokens, one whose prompt is
bounded after each part of it. What it holds packed and the whole blocks behind that are then chosen from together, and
packed anew. The blocks that this takes are free ones, left when everybody has been scheduled: an eviction that finds
none waits, and so does whoever would be let in meanwhile. A request that generates goes on as it is; one that reads
stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_defensive.compat.base import get_logger
from vllm_defensive.engine.life import Life, Phase
from vllm_defensive.engine.lifecycle import Lifecycle
from vllm_defensive.engine.outlook import Outlook
from vllm_defensive.packing import Region
from vllm_defensive.policy import PRESETS
from vllm_defensive.settings.engine import NONE

logger = get_logger("kv_eviction")

SETTLED = (Phase.PACKED, Phase.WHOLE)


class Again:
    """Those of one scheduler."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        outlook: Outlook,
        pool: BlockPool,
        blocks_of: Mapping[str, Sequence[KVCacheBlock]],
    ) -> None:
        """blocks_of: the positional blocks of each request."""
        self._lifecycle, self._outlook, self._pool, self._blocks_of = lifecycle, outlook, pool, blocks_of
        self._due: dict[str, Life] = {}  # that have generated enough, or whose window has begun
        # The scheduler's, set by it: draft tokens of a request in a step, at most; tokens of a step, at most; whether a
        # step is scheduled before the one before it has been processed.
        self.drafts, self.step_tokens, self.ahead = 0, 0, False
        self.starved = False  # an eviction of the last step found no room
        self._stuck = False  # nobody could be scheduled, as all wait for room to be evicted

    def expect(self, life: Life) -> None:
        """A request is about to begin, perhaps anew."""
        settings = life.settings
        if life.full or settings.policy == NONE or (settings.answers == "keep" and settings.prompts == "whole"):
            return
        name = PRESETS[settings.policy].evicts_answers_by
        if name is None or not self._outlook.settings.evicts_again(settings.policy):
            return  # what it falls back to cannot
        if settings.prompts == "bounded" and life.stop > self._part(life) and not life.request.mm_features:
            life.bounded, life.key, life.echo_tokens = life.stop, None, 0
            if life.ahead:
                life.turn(Phase.WHOLE)
        life.again = self._stop_behind(life, 0)
        life.again_window = 0 if PRESETS[name].lasting else self._outlook.settings.window

    def _part(self, life: Life) -> int:
        """Tokens of a bounded prompt that are read from one eviction to the next."""
        return life.settings.prompt_interval or self.step_tokens

    def _stop_behind(self, life: Life, stop: int) -> int:
        """Where a request is looked at next, 0: nowhere. stop: where it was last."""
        if stop < life.bounded:
            return min(stop + self._part(life), life.bounded)
        if life.settings.answers == "keep" or life.request.max_tokens == 1:
            return 0
        return max(stop, life.request.num_prompt_tokens) + life.settings.interval

    def note(self, life: Life, num_tokens: int) -> None:
        """A request was given slots for so many tokens."""
        if life.again and num_tokens > life.looked_at_from:
            self._due[life.request.request_id] = life

    def chunk(self, life: Life, computed: int, num_new: int) -> int:
        """How many of these tokens a request may compute in a step. Who reads ends a step at each of its stops, and
        stands still there until it was evicted: a bounded prompt, whose peak is planned so, and a request that was
        preempted, and comes to see what it saw before. Unless nobody can move: then vLLM is to throw somebody out."""
        reads = computed < life.bounded or life.request.num_tokens - computed > 1
        if not reads or self._stuck:
            return num_new
        waits = computed >= life.again or life.phase is Phase.PACKING
        return 0 if waits else min(num_new, life.again - computed)

    def begin(self, scheduled: Mapping[str, int], running: Sequence[Request]) -> None:
        """A step was scheduled: plan the evictions that are due with it, as far as there is room. scheduled: tokens of
        each request in the step."""
        self._stuck = self.starved = False
        if not self._due:
            return
        room: int | None = None  # counted once somebody asks
        planned = False
        for request_id, life in list(self._due.items()):
            if self._lifecycle.lives.get(request_id) is not life:
                del self._due[request_id]
                continue
            end, window = life.request.num_computed_tokens, (life.again - life.again_window, life.again)
            if life.again_window and end > window[0] and end - scheduled.get(request_id, 0) < window[1]:
                self._lifecycle.observe(request_id, window)
            if self.certain_tokens(life.request) >= life.again and life.phase in SETTLED:
                room = self._room(running) if room is None else room
                if (taken := self._evict(life, room)) is not None:
                    del self._due[request_id]
                    room, planned = room - taken, True
                    continue
                self.starved = True
            if life.again_window and end >= life.again:
                self._lifecycle.hold(request_id)
        idle = not scheduled and not any(request.num_in_flight_tokens for request in running)
        self._stuck = idle and not planned

    def certain_tokens(self, request: Request) -> int:
        """What is computed for sure once the present step is over: drafts may turn out wrong."""
        return request.num_computed_tokens - (request.num_in_flight_tokens if self.drafts else 0)

    def _room(self, running: Sequence[Request]) -> int:
        """Blocks that nobody needs before those that go back have come back."""
        room = self._pool.get_num_free_blocks()
        return room - sum(self.next_blocks(request) for request in running) if self.ahead else room

    def next_blocks(self, request: Request) -> int:
        """Blocks that a request may take in the next step, beside those that it has."""
        computed, life = request.num_computed_tokens, self._lifecycle.get(request.request_id)
        tokens = max(1, min(self.step_tokens, request.num_tokens - computed))
        if life is not None and life.again:
            tokens = self.chunk(life, computed, tokens)  # who stands still waits for room itself
        held = len(self._blocks_of.get(request.request_id, ()))
        return max(0, cdiv(computed + tokens + self.drafts, self._outlook.block_tokens) - held) if tokens else 0

    def _evict(self, life: Life, room: int) -> int | None:
        """Plan one eviction. Returns the blocks that it takes, 0 if nothing is to be gained; None: there is no room.

        What came behind its stop, if it had to wait, stays as it is: so the same tokens are kept, whoever was there.
        """
        request_id, settings, stop = life.request.request_id, life.settings, life.again
        region, held = self.region(life, stop)
        policy = PRESETS[settings.policy].evicts_answers_by
        count = self._outlook.budget_blocks(settings, region, policy, held)
        if not count or (life.packing is not None and region.full_blocks == life.packing.region.full_blocks):
            life.again = self._stop_behind(life, stop)
            return 0
        if count > room:
            return None
        assert policy is not None
        first = 0 if life.packing is None else life.packing.region.full_blocks
        source = [block.block_id for block in self._blocks_of[request_id][first : cdiv(stop, region.block_tokens)]]
        packed, format = self._pool.get_new_blocks(count), self._outlook.format(settings)
        self._lifecycle.pack_again(life, policy, region, packed, source, format)
        life.again = self._stop_behind(life, stop)
        return count

    def region(self, life: Life, stop: int) -> tuple[Region, int]:
        """What an eviction at this stop chooses from, and in how many blocks it lies."""
        tokens = self._outlook.block_tokens
        if life.packing is not None:
            before = life.packing.region
            region = self._outlook.region(stop, before.shared_blocks)
            return region, len(life.blocks) + region.full_blocks - before.full_blocks
        protected = min(cdiv(life.settings.protect, tokens), stop // tokens)
        region = self._outlook.region(stop, protected)
        return region, region.blocks

    def postpone(self, life: Life) -> None:
        """An eviction could not be carried out: the next one is that whose window is still to come."""
        while life.again and life.looked_at_from < life.request.num_computed_tokens:
            life.again = self._stop_behind(life, life.again)

    # -- who is let in ------------------------------------------------------------------------------------------------

    def lets_in(self, life: Life, running: Iterable[Request], lasting: Callable[[Request], int]) -> bool:
        """Whether those that run never take more than there is, with this one: what each takes at most before one of
        its evictions, and what one of these takes beside. lasting: blocks of a request that is not evicted again, at
        its present length."""
        total, packed = self._most_blocks(life)
        total += self._outlook.blocks_beside(life.request.num_tokens)
        for request in running:
            other = self._lifecycle.get(request.request_id)
            if other is None or not other.again:
                total += lasting(request)
                continue
            blocks, beside = self._most_blocks(other)
            total, packed = total + blocks, max(packed, beside)
            total += self._outlook.blocks_beside(request.num_tokens)
        return total + packed <= self._usable - self._lifecycle.library.pins.idle_blocks

    @property
    def _usable(self) -> int:
        return self._pool.num_gpu_blocks - 1  # one is vLLM's null block

    def _most_blocks(self, life: Life) -> tuple[int, int]:
        """(Blocks that a request holds at most while it generates, blocks that one of its evictions packs at most.)"""
        if life.most_blocks is None:
            request, settings, tokens = life.request, life.settings, self._outlook.block_tokens
            longest = min(request.num_prompt_tokens + request.max_tokens, self._outlook.max_model_len)
            most, packed = cdiv(longest, tokens), 0
            protected = min(cdiv(settings.protect, tokens), longest // tokens)
            region = self._outlook.region(longest, protected)
            if settings.policy != NONE:
                policy = PRESETS[settings.policy].evicts_answers_by if life.again else settings.policy
                packed = self._outlook.budget_blocks(settings, region, policy, region.blocks)
            if packed and life.again:
                part = settings.interval if settings.answers == "evict" else longest - request.num_prompt_tokens
                if life.bounded:
                    read, part = 0, max(self._part(life), part)
                else:
                    read = cdiv(request.num_prompt_tokens, tokens)
                    if (there := life.published) is not None:  # it begins with that, and no originals
                        read += len(there.packed) - there.end // tokens
                between = self._outlook.settings.blocks_between(
                    max(packed + region.shared_blocks, read), part + self.drafts, tokens
                )
                behind = cdiv(request.num_prompt_tokens - life.bounded, tokens) if life.bounded else 0
                most = min(between + behind, most)
            life.most_blocks = most, packed
        return life.most_blocks

    def fits(self, life: Life) -> bool:
        """Whether a request can be served at all, where prompts may be larger than the memory. Its answer ends where
        the memory does, if it is not evicted."""
        request, usable = life.request, self._usable - self._outlook.blocks_beside(self._outlook.max_model_len)
        wanted = request.max_tokens
        for request.max_tokens in (wanted, 1):
            life.most_blocks = None
            if (room := usable - sum(self._most_blocks(life))) >= 0:
                break
        if request.max_tokens < wanted:
            request.max_tokens = max(1, min(wanted, room * self._outlook.block_tokens))
            life.most_blocks = None
        if room < 0:
            told = "%s is not served: it does not fit into the KV cache, nor can it be read in parts that would"
            logger.warning("KV eviction: " + told, request.request_id)
        return room >= 0

    def caps(self, life: Life) -> int:
        """Blocks that are enough for a request whose prompt may be larger than the memory."""
        return min(sum(self._most_blocks(life)), self._usable)

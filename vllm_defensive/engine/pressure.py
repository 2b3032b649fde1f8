"""Requests that stay whole until their memory is wanted: when it is, whose, and how much of it.

A request is *ripe* once its prompt was read. It is evicted, late, where somebody would have to wait for memory, or be
thrown out for want of it: of all that are ripe those first of which most is still there, so that nobody loses twice
before others have lost once. Where scores last, each gives back half at a time, and is asked again when that was not
enough; others are packed once, to what is to be kept, as they would have been at the end of their prompts: workers keep
the queries of their windows until then.

To pack takes free blocks, and what is packed comes back a step later. So some are left free: what the next step may
take, and what the next one to be packed is packed into. Whoever would be let in leaves them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_defensive.engine.again import SETTLED, Again
from vllm_defensive.engine.life import Life
from vllm_defensive.engine.lifecycle import Lifecycle
from vllm_defensive.engine.outlook import Outlook
from vllm_defensive.packing import Region
from vllm_defensive.policy import PRESETS

_MOST_SET_ASIDE = 8
"""Of all blocks, one in so many, so that a request can be packed to half of its memory first."""


class _Offer(NamedTuple):
    """What one request can give.

    there: share of its memory that is still there. frees: blocks that come back; least, most: blocks that this takes.
    worth: whether enough would be gained; if not, what it takes later is still to be left free.
    source: ids of whole blocks that are packed, and of the one behind them, if that has tokens before the stop.
    """

    there: float
    frees: int
    least: int
    most: int
    worth: bool
    life: Life
    region: Region
    source: list[int]


class Pressure:
    """What one scheduler's memory is asked for, and who gives it."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        outlook: Outlook,
        pool: BlockPool,
        again: Again,
        blocks_of: Mapping[str, Sequence[KVCacheBlock]],
    ) -> None:
        """blocks_of: the positional blocks of each request."""
        self._lifecycle, self._outlook, self._pool = lifecycle, outlook, pool
        self._again, self._blocks_of = again, blocks_of
        self._reserve = 0  # free blocks that packing takes
        self._seen, self._age = 0, 0  # changes among these requests when that was found, and steps since
        self._asked: dict[str, int] = {}  # in this step, by requests without blocks
        self._wanted = 0  # of these, what there was no room for

    def ask(self, life: Life, blocks: int) -> int:
        """A request without blocks asks for so many. Returns how many have to be free for it to get them."""
        if not life.full and not self._reserve:
            return blocks
        own = self._own(life)
        # While it is read, the others go on.
        request_id, tokens = life.request.request_id, self._outlook.block_tokens
        reads, others = cdiv(life.request.num_tokens, self._again.step_tokens) + 2, len(self._lifecycle.lives)
        needed = blocks + max(own, self._reserve) + cdiv(others * reads, tokens) + bool(others)
        beside = self._outlook.blocks_beside(life.request.num_tokens)  # of which vLLM counts those that it lacks
        self._asked[request_id] = max(needed + beside, self._asked.get(request_id, 0))
        return needed

    def admit(self, life: Life) -> None:
        """A request gets its first blocks: who asks behind it in the same step leaves what it is to be packed into."""
        self._reserve = max(self._reserve, self._own(life))

    def _own(self, life: Life) -> int:
        """Blocks that a request which has none yet will be packed into, if it is to give any."""
        gives = life.full and life.fits and (life.ahead or life.settings.answers == "evict")
        return self._outlook.least_blocks(life) if gives else 0

    def refuse(self, request_id: str) -> None:
        """There was no room for this request."""
        self._wanted = max(self._wanted, self._asked.get(request_id, 0))

    def begin(self, running: Sequence[Request]) -> None:
        """A step was scheduled: plan the evictions that are to be carried out with it."""
        wanted, self._wanted = self._wanted, 0
        self._asked.clear()
        lifecycle, steps, blocks = self._lifecycle, 2 if self._again.ahead else 1, self._outlook.block_tokens
        free, self._age = self._pool.get_num_free_blocks(), self._age + 1
        grown = self._age * (1 + self._again.drafts) >= blocks
        offers = self._look() if grown or self._seen != lifecycle.ripe_changes else None
        if not lifecycle.ripe:
            return
        # What all that run can take at most, of each KV cache group, before anybody counts it.
        groups = 1 + len(self._outlook.other_managers)
        most = len(running) * (1 + cdiv(self._again.drafts, blocks)) + cdiv(self._again.step_tokens, blocks)
        packed = sum(self._outlook.least_blocks(life) for life in lifecycle.still_read if not life.full)
        if free >= max(wanted, self._reserve) + steps * groups * most + packed:
            return
        soon = groups * min(most, sum(map(self._again.next_blocks, running)))
        coming = sum(map(_returns, lifecycle.packing.values()))
        there = free + coming - steps * soon - packed
        if there >= max(wanted, self._reserve):
            return
        offers = self._look() if offers is None else offers
        if wanted > there + sum(offer.frees - offer.least for offer in offers if offer.worth):
            wanted = 0  # it would wait all the same
        short = max(wanted, self._reserve) - there
        room = free - soon if self._again.ahead else free
        for offer in offers:
            count = min(offer.most, room)
            if short > 0 and offer.worth and offer.least <= count < offer.frees:
                self._pack(offer, count)
                room, short = room - count, short - (offer.frees - count)

    def _look(self) -> list[_Offer]:
        """What there is to be had, in the order in which it is taken. Blocks are set aside with which each of these can
        be, those that will be there soon, too; and the first by half, if that is not too much of all memory."""
        found = [self._offer(life) for life in list(self._lifecycle.ripe.values())]
        offers = sorted((o for o in found if o is not None), key=lambda o: (o.there, o.frees), reverse=True)
        # Answers grow, and what they are packed into with them: by a block until somebody looks again.
        takes = [offer.least + (offer.life.settings.answers == "evict") for offer in offers]
        takes += [min(offer.most, self._pool.num_gpu_blocks // _MOST_SET_ASIDE) for offer in offers[:1]]
        takes += [self._outlook.least_blocks(life) for life in self._lifecycle.still_read if life.full and life.ahead]
        self._seen, self._age, self._reserve = self._lifecycle.ripe_changes, 0, max(takes, default=0)
        return offers

    def _offer(self, life: Life) -> _Offer | None:
        """What a request can give now, if it can."""
        request, settings = life.request, life.settings
        if life.phase not in SETTLED:
            return None
        stop = life.stop
        if settings.answers == "evict":
            stop = self._again.certain_tokens(request)
            if stop < request.num_prompt_tokens:
                return None
        blocks = self._blocks_of[request.request_id]
        region, held = self._again.region(life, stop)
        if life.packing is None:
            region = self._outlook.region(stop, max(region.shared_blocks, self._shared(blocks, region)))
            held = region.blocks
        grows = settings.answers == "evict"  # and gives something later, if it does not now
        least = self._outlook.budget_blocks(settings, region, held_blocks=region.blocks if grows else held)
        first = 0 if life.packing is None else life.packing.region.full_blocks
        alone = blocks[max(first, region.shared_blocks) : region.full_blocks]
        frees = len(life.blocks) + sum(block.ref_cnt == 1 for block in alone)
        most = least
        if PRESETS[settings.policy].lasting:
            for_all = region.blocks_for_all(self._outlook.format(settings))
            most = max(least, min(cdiv(held, 2), for_all, frees - 1))
        if not least or (least >= frees and not grows):
            if life.packing is not None and not grows:
                self._lifecycle.spare(request.request_id)  # it has given all that it may
            return None
        enough = cdiv(settings.interval, region.block_tokens) if grows and life.packing is not None else 1
        source = [block.block_id for block in blocks[first : cdiv(stop, region.block_tokens)]]
        return _Offer(held / region.blocks, frees, least, most, frees - least >= enough, life, region, source)

    def _shared(self, blocks: Sequence[KVCacheBlock], region: Region) -> int:
        """Leading blocks that others hold too: to pack them frees nothing."""
        if self._outlook.settings.shared == "evict":
            return 0
        alone = (i for i, block in enumerate(blocks[: region.full_blocks]) if block.ref_cnt == 1)
        return next(alone, region.full_blocks)

    def _pack(self, offer: _Offer, count: int) -> None:
        life, policy = offer.life, offer.life.settings.policy
        self._lifecycle.pack_again(
            life,
            policy,
            offer.region,
            self._pool.get_new_blocks(count),
            offer.source,
            self._outlook.format(life.settings),
            lasts=PRESETS[policy].lasting,
        )


def _returns(life: Life) -> int:
    """Blocks that come back once a request is packed, but for those that others hold, too."""
    assert life.packing is not None
    before = 0 if life.former is None else life.former.packing.saved_blocks
    return life.packing.saved_blocks - before + len(life.blocks)

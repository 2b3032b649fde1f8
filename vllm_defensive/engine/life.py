"""The life of a request that may be evicted, from its first allocation until its blocks are freed.

    phase     how it is left                           positional blocks of the request      packed blocks
    PREFILL   the allocation that reaches its stop     all `ceil(tokens / N)`                none
    ECHOING   the step that ends its last echo         all, and its echo holds them too      `K` fresh ones, empty
    PACKING   the step that packs has been processed   all                                   `K` fresh ones
    PACKED    an eviction of what was generated        `[0, s)` and from `g` on; null        `K`; others may hold
                                                       blocks keep the other positions       them, too
    WHOLE     the same                                 all                                   none

ECHOING are those whose policy looks at the document again (`echo.py`); all others go on to PACKING at once. A request
is WHOLE if nothing is to be gained by its eviction, or if it could not be carried out, or as long as nobody wants its
memory (`pressure.py`). One that is evicted more than once (`again.py`) is PACKING time and again: then it holds the
blocks that it packs into beside those that it packed before. One that finds the packing of an earlier request
(`published.py`) is PACKED with its first allocation. From every phase a request may be finished, aborted or preempted,
which gives all its blocks back and ends its life; one that is resumed begins anew, and passes the same stops again.

A request that waits has a life as well, an outlook: it is thrown away at the next look, for what the request shares
with others, and whether it fits, may have changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_defensive.engine.published import Key, Published
from vllm_defensive.packing import Packing
from vllm_defensive.plan import Eviction
from vllm_defensive.policy import PRESETS
from vllm_defensive.settings.engine import NONE
from vllm_defensive.settings.request import RequestSettings


class Phase(Enum):
    PREFILL = "its stop lies ahead"
    ECHOING = "its stop was reached, and it stands still: others repeat its prompt for it"
    PACKING = "its stop was reached: originals and packed blocks are there side by side"
    PACKED = "its originals have gone back"
    WHOLE = "all of it is in place, and no eviction of it is under way"


# Names by themselves: members of an enumeration are slow to find, and these are asked for all the time.
PREFILL, ECHOING = Phase.PREFILL, Phase.ECHOING

_NEXT = {
    Phase.PREFILL: (Phase.ECHOING, Phase.PACKING, Phase.PACKED, Phase.WHOLE),
    Phase.ECHOING: (Phase.PACKING, Phase.WHOLE),
    Phase.PACKING: (Phase.PACKED, Phase.WHOLE),
    Phase.PACKED: (Phase.PACKING,),
    Phase.WHOLE: (Phase.PACKING,),
}


@dataclass(eq=False)
class Life:
    """stop: `T`, where the request is evicted: its boundary, or the end of its prompt (again, if it was preempted);
    from its second eviction on, that of the last one.
    again: tokens at which it is looked at next while it generates; 0: never. again_window: of these, the last ones
    whose queries are looked at then. evictions: so far. bounded: tokens of its prompt that are evicted as they are
    read; 0: it is evicted once it is there as a whole.
    former, replaced: while it is packed anew, what it was packed into before.
    exact_tokens: before this one what it holds in place was computed over all that came before.
    most_blocks: what it holds at most, and packs at most, while it generates; None: not asked for yet.
    brief: it ends with its prefill. is_echo: it is a request of our own, which repeats another's prompt.
    hit_tokens: what the prefix cache served.
    eviction, blocks: what it holds packed, from ECHOING or PACKING on.
    fits: the pool can hold its originals and what is packed of them side by side; else it is evicted only by beginning
        with what another has packed.
    key: under which its packing is found by others, or that of another by it; None: it keeps to itself.
    published: the packing, if others may hold it too; of one that is about to be let in, the one that it begins with.
    adopted: that was another's.
    echoed: positions before this one have been repeated. repeated: tokens that its echoes have taken so far.
    fence: the step that packs; 0 where that is the step that reached the stop.
    ready_tokens: up to here the request has slots, and no block is left to hash. cached: the prefix cache has every
        block of it that it may have.
    echo_tokens: how many tokens of its prompt one echo repeats; 0: its policy takes no second look.
    sums_attention: of its policy; looked up once, for it is asked of each relative of a request that is planned for.
    reads_window: of its policy, too: whether workers keep its window's queries.
    """

    request: Request
    settings: RequestSettings
    stop: int
    phase: Phase
    brief: bool = False
    is_echo: bool = False
    hit_tokens: int = 0
    echo_tokens: int = 0
    again: int = 0
    again_window: int = 0
    evictions: int = 0
    bounded: int = 0
    fits: bool = True
    eviction: Eviction | None = None
    blocks: list[KVCacheBlock] = field(default_factory=list)
    former: Eviction | None = None
    replaced: list[KVCacheBlock] = field(default_factory=list)
    exact_tokens: int = 0
    most_blocks: tuple[int, int] | None = None
    key: Key | None = None
    published: Published | None = None
    adopted: bool = False
    echoed: int = 0
    repeated: int = 0
    fence: int = 0
    ready_tokens: int = 0
    cached: bool = False
    sums_attention: bool = field(init=False)
    reads_window: bool = field(init=False)

    def __post_init__(self) -> None:
        policy = PRESETS.get(self.settings.policy)  # there is none called "none"
        self.sums_attention = policy is not None and policy.accumulates
        self.reads_window = policy is not None and policy.needs_window and not (self.full and policy.lasting)

    def turn(self, phase: Phase) -> None:
        assert phase in _NEXT[self.phase], f"{self.request.request_id}: {self.phase.name} to {phase.name}"
        self.phase = phase

    @property
    def ahead(self) -> bool:
        """Whether its stop is still to be reached."""
        return self.phase is PREFILL

    @property
    def full(self) -> bool:
        """Whether it is evicted when memory is short, and not before."""
        return self.settings.when == "full" and self.settings.policy != NONE

    @property
    def looked_at_from(self) -> int:
        """A step with tokens behind this many matters to its next eviction while it generates."""
        return self.again - max(self.again_window, 1)

    @property
    def packing(self) -> Packing | None:
        return None if self.eviction is None else self.eviction.packing

    @property
    def accumulates(self) -> bool:
        """Whether every query up to its stop must be computed: the request reads nobody's blocks."""
        return self.sums_attention and self.ahead

    @property
    def next_part(self) -> tuple[int, int]:
        """Positions that its next echo repeats."""
        assert self.eviction is not None
        first = max(self.echoed, self.eviction.region.tokens[0])
        return first, min(first + self.echo_tokens, self.stop)

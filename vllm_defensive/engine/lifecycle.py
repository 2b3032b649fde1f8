"""What the scheduler's process knows of a request that may be evicted."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_defensive.policy import PRESETS
from vllm_defensive.settings.request import RequestSettings


@dataclass
class RequestState:
    """What is planned for a request that waits, and known of it from its first allocation until its blocks are freed.

    num_tokens: `T`, where it is evicted: its boundary, or the end of its prompt (again, if it was preempted).
    decided: the allocation that reaches `T` has been made, or this is not a request to evict.
    fleeting: it ends with its prefill.
    The rest is set when it is evicted.
    """

    num_tokens: int
    settings: RequestSettings
    decided: bool
    fleeting: bool = False
    shared_blocks: int = 0
    full_blocks: int = 0
    packed: list[KVCacheBlock] = field(default_factory=list)

    @property
    def saved_blocks(self) -> int:
        """Blocks given back by the release, net of the packed ones."""
        return self.full_blocks - self.shared_blocks - len(self.packed)

    @property
    def accumulates(self) -> bool:
        """Whether every query up to `T` must be computed: the request reads nobody's blocks."""
        return not self.decided and PRESETS[self.settings.policy].accumulates

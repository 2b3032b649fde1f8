"""Evictions as the scheduler plans them, for tests of what carries them out."""

from __future__ import annotations

from vllm_defensive.packing import Packing, Region
from vllm_defensive.plan import Eviction, Score


def eviction(
    stop: int,
    packed_blocks: tuple[int, ...],
    *,
    block_tokens: int,
    page_tokens: int | None = None,
    shared_blocks: int = 0,
    source_blocks: tuple[int, ...] = (),
    request_id: str = "r",
    policy: str = "snapkv",
    keep: float = 0.2,
    window: int = 32,
    token_ids: tuple[int, ...] | None = None,
) -> Eviction:
    region = Region(stop, shared_blocks, window, block_tokens, page_tokens=page_tokens or block_tokens)
    return Eviction(
        Score(request_id, policy, keep, region, source_blocks), Packing(region, packed_blocks, region.plain), token_ids
    )

"""Steps that skip vLLM's block managers leave the same blocks, hashes and free memory as vLLM's own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Harness
from tests.engine.integrity import check_integrity


def blocks_of(h: Harness) -> dict[str, list[int]]:
    return {r: [block.block_id for block in blocks] for r, blocks in h.manager.req_to_blocks.items() if blocks}


def cached_blocks(h: Harness) -> dict[int, Any]:
    return {b.block_id: b.block_hash for b in h.pool.blocks if b.block_hash is not None}


@pytest.mark.parametrize(
    "changes",
    [{}, {"asynchronous": True}, {"caching": False}, {"caching": False, "asynchronous": True}, {"drafts": 3}],
    ids=["sync", "async", "uncached", "uncached-async", "drafts"],  # vLLM has no asynchronous n-gram drafts
)
def test_requests_that_are_left_alone_are_scheduled_as_by_stock_vllm(tiny_model: Path, changes: dict[str, Any]) -> None:
    common = {"num_blocks": 24, "block_size": 32, "chunk": 100, **changes}
    stock = Harness(tiny_model, policy=None, **common)
    ours = Harness(tiny_model, policy="none", per_request=True, **common)
    walk, asked = random.Random(0), [0]
    allocate = ours.manager.get_num_blocks_to_allocate

    def counted(*args: Any, **kwargs: Any) -> int:
        asked[0] += 1
        return allocate(*args, **kwargs)

    ours.manager.get_num_blocks_to_allocate = counted
    shared = [walk.randrange(2, 500) for _ in range(100)]
    scheduled = preempted = 0
    for _ in range(600):
        if walk.random() < 0.2 and len(stock.scheduler.requests) < 12:
            prompt = (shared if walk.random() < 0.5 else []) + [
                walk.randrange(2, 500) for _ in range(walk.randrange(1, 90))
            ]
            limit = walk.randrange(1, 120)
            assert stock.add(prompt, limit) == ours.add(prompt, limit)
        if walk.random() < 0.02 and stock.scheduler.requests:
            victim = walk.choice(list(stock.scheduler.requests))
            stock.abort(victim)
            ours.abort(victim)
        theirs, mine = stock.step(), ours.step()
        assert mine.num_scheduled_tokens == theirs.num_scheduled_tokens
        assert mine.preempted_req_ids == theirs.preempted_req_ids
        scheduled += len(mine.num_scheduled_tokens)
        preempted += len(mine.preempted_req_ids or ())
        assert blocks_of(ours) == blocks_of(stock)
        assert cached_blocks(ours) == cached_blocks(stock)
        assert ours.pool.get_num_free_blocks() == stock.pool.get_num_free_blocks()
        check_integrity(ours.manager)
    assert preempted > 5
    assert asked[0] < scheduled / 2, "most steps of a request need nothing"

"""The prefix cache stays exact, and requests that share a prefix never hold more memory than without eviction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from tests.engine.integrity import released
from vllm_defensive.engine.life import Phase

W, N = 32, 32
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def hashed_positions(h: Harness, request_id: str) -> int:
    """Leading tokens of a request, its answer included, that the prefix cache would hand out now."""
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    request = h.scheduler.requests[request_id]
    cached = h.pool.cached_block_hash_to_block
    found = [cached.get_one_block(make_block_hash_with_group_id(x, 0)) is not None for x in request.block_hashes]
    return [*found, False].index(False) * N


@MODES
@pytest.mark.parametrize("length", [640, 641, 672, 671, 700])
def test_a_hit_leaves_the_window_to_compute(tiny_model: Path, length: int, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=100, asynchronous=asynchronous)
    h.add(text(length, 0))
    h.run()
    again = h.add(text(length, 0))
    h.run()
    assert h.hits[again] == (length - W) // N * N
    assert length - h.hits[again] >= W
    assert len(h.evictions) == 2
    assert h.manager.lifecycle.totals.prefix_hit_tokens == h.hits[again]
    h.assert_all_returned()


@pytest.mark.parametrize(
    "length, boundary, drafts, hit",
    [(641, None, 0, 640), (641, None, 3, 608), (642, None, 3, 640), (673, 641, 3, 640), (642, 641, 3, 640)],
)
@pytest.mark.parametrize("others", [0, 1])
def test_a_hit_leaves_more_than_a_row_that_vllm_would_fill_with_drafts(
    tiny_model: Path, length: int, boundary: int | None, drafts: int, hit: int, others: int
) -> None:
    """A window of one token leaves one to compute; vLLM pads such a row as if it were decoded already."""
    h = Harness(tiny_model, num_blocks=100, window=1, drafts=drafts, reuse="off")
    own = None if boundary is None else {"kv_eviction_boundary": boundary}
    h.add(text(length, 0), extra_args=own)
    h.run()
    for i in range(others):
        h.add(text(20, i + 1), max_tokens=30)
    h.step()
    again = h.add(text(length, 0), extra_args=own)
    h.run()
    assert h.hits[again] == hit
    assert [e.region.stop for e in h.evictions] == [boundary or length] * 2
    h.assert_all_returned()


def test_a_prompt_that_is_left_alone_hits_all_but_its_last_token(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=100, min_tokens=700)
    for _ in range(2):
        last = h.add(text(641, 0))
        h.run()
    assert h.hits[last] == 640
    assert h.manager.lifecycle.totals.prefix_hit_tokens == 0, "which are of evicted requests"


@MODES
def test_nothing_computed_after_the_eviction_is_ever_hashed(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=100, asynchronous=asynchronous)
    first = h.add(text(700, 0), max_tokens=150)
    while first in h.live:
        h.step()
        if first in h.live:
            assert hashed_positions(h, first) <= 700 // N * N
    h.run()
    # The next turn extends the answer. Its hit ends where the first prompt's full blocks end.
    second = h.add(h.tokens(first) + text(50, 1))
    h.run()
    assert h.hits[second] == 700 // N * N
    # Unlike the answer, the second prompt was computed from an exact context as a whole, and is hashed.
    third = h.add(h.tokens(second) + text(50, 2))
    h.run()
    assert h.hits[third] == 900 // N * N
    h.assert_all_returned()


@MODES
def test_released_originals_can_be_hit_while_the_request_still_runs(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=100, asynchronous=asynchronous)
    h.add(text(640, 0), max_tokens=60)
    for _ in range(8):
        h.step()
    again = h.add(text(640, 0) + text(100, 1), max_tokens=60)
    h.run()
    assert h.hits[again] == 640
    h.assert_all_returned()


def two_requests(tiny_model: Path, shared: str, keep: float) -> Harness:
    """Two live requests with 640 common tokens; both are submitted before either is evicted."""
    h = Harness(tiny_model, num_blocks=200, shared=shared, keep=keep, chunk=2048)
    for i in range(2):
        h.add(text(640, 0) + text(200, i + 1), max_tokens=60)
    h.run()
    h.assert_all_returned()
    return h


@pytest.mark.parametrize("keep, shared_blocks", [(0.2, 0), (0.5, 20), (0.8, 20)])
def test_a_prefix_is_left_in_place_once_its_copies_would_cost_more(
    tiny_model: Path, keep: float, shared_blocks: int
) -> None:
    h = two_requests(tiny_model, "keep", keep)
    assert [e.region.shared_blocks for e in h.evictions] == [shared_blocks] * 2
    if shared_blocks:
        assert h.evictions[0].score.source_blocks[:20] == h.evictions[1].score.source_blocks[:20], "one copy"


def test_shared_blocks_are_evicted_when_asked_to(tiny_model: Path) -> None:
    h = two_requests(tiny_model, "evict", 0.8)
    assert [e.region.shared_blocks for e in h.evictions] == [0, 0]


@MODES
@pytest.mark.parametrize("shared", ["keep", "evict"])
def test_a_protected_prefix_is_shared_in_place(tiny_model: Path, asynchronous: bool, shared: str) -> None:
    """Whatever else is evicted: two live requests read, and hold, the same blocks of a system prompt."""
    h = Harness(tiny_model, num_blocks=200, keep=0.1, shared=shared, asynchronous=asynchronous)
    protect = {"kv_eviction_protect": 128}
    first = h.add(text(128, 0) + text(500, 1), max_tokens=60, extra_args=protect)
    while not released(h.manager, first):
        h.step()
    second = h.add(text(128, 0) + text(300, 2), max_tokens=60, extra_args=protect)
    while not released(h.manager, second):
        h.step()
        h.check()
    assert h.hits[second] == 128
    assert [e.region.shared_blocks for e in h.evictions] == [4, 4]
    assert h.evictions[0].score.source_blocks[:4] == h.evictions[1].score.source_blocks[:4]
    tables = [h.manager.req_to_blocks[request_id] for request_id in (first, second)]
    for place in range(4):
        mine, theirs = (table[place] for table in tables)
        assert mine is theirs and mine.ref_cnt == 2
    for table, length in zip(tables, (628, 428), strict=True):
        assert all(block.is_null for block in table[4 : length // N])
    h.abort(first)
    h.step()
    assert [block.ref_cnt for block in tables[1][:4]] == [1] * 4, "the other still reads them"
    h.run()
    h.assert_all_returned()


def test_blocks_that_an_evicted_request_shares_stay_with_it(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=0.5, chunk=2048)
    ids = [h.add(text(640, 0) + text(200, i + 1), max_tokens=[5, 60][i]) for i in range(2)]
    while ids[0] in h.live:
        h.step()
    packing = h.manager.lifecycle.lives[ids[1]].packing
    assert released(h.manager, ids[1]) and packing is not None and packing.region.shared_blocks == 20
    assert all(not block.is_null for block in h.manager.req_to_blocks[ids[1]][:20])
    # A third one with the same prefix hits those very blocks; they are pinned, so it leaves them in place as well.
    third = h.add(text(640, 0) + text(200, 9))
    h.run()
    assert h.hits[third] == 640
    assert h.evictions[-1].region.shared_blocks == 20
    h.assert_all_returned()


def held_by_step(tiny_model: Path, question: int, **arguments: Any) -> tuple[list[int], list[int], Harness]:
    """(blocks held, those of them that evictions in flight hold a moment longer) after every step."""
    h = Harness(tiny_model, num_blocks=1000, **arguments)
    for i in range(20):
        h.add(text(1000, 0) + text(question, i + 1), max_tokens=40)
    held, moving = [], []
    while h.scheduler.has_requests():
        h.step()
        h.check()
        held.append(h.held)
        moving.append(sum(len(life.blocks) for life in h.manager.lifecycle.packing.values()) if h.eviction else 0)
    h.assert_all_returned()
    return held, moving, h


@MODES
@pytest.mark.parametrize("keep", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("chunk", [512, 4096])
@pytest.mark.parametrize("question", [40, 100, 400])
def test_twenty_questions_about_one_text_hold_no_more_than_stock(
    tiny_model: Path, question: int, chunk: int, keep: float, asynchronous: bool
) -> None:
    """At the same step, and but for the packed blocks of those whose originals are given back in the next step."""
    stock, _, _ = held_by_step(tiny_model, question, chunk=chunk, asynchronous=asynchronous, policy=None)
    ours, moving, h = held_by_step(tiny_model, question, chunk=chunk, asynchronous=asynchronous, keep=keep)
    assert len(ours) == len(stock)
    assert all(a - b <= c for a, b, c in zip(ours, moving, stock, strict=True))
    if question >= 100 and keep <= 0.2:
        assert {e.region.shared_blocks for e in h.evictions} == {31}
        assert sum(ours) < 0.75 * sum(stock)


def test_questions_shorter_than_the_window_cost_no_more_than_stock(tiny_model: Path) -> None:
    """There is nothing to evict beside the shared text, so their hits need not stop short of its end."""
    stock, _, _ = held_by_step(tiny_model, 20, chunk=4096, policy=None)
    ours, _, h = held_by_step(tiny_model, 20, chunk=4096, keep=0.2)
    assert all(a <= b for a, b in zip(ours, stock, strict=True))
    assert not h.evictions


def test_a_spared_request_stays_unevicted_when_the_others_are_gone(tiny_model: Path) -> None:
    """Its window was not computed, so it must not be evicted in a later chunk although nobody shares any more."""
    h = Harness(tiny_model, num_blocks=400, keep=0.5, chunk=64)
    ids = [h.add(text(640, 0) + text(20, i + 1), max_tokens=3) for i in range(4)]
    lives = h.manager.lifecycle.lives
    while not any(life.phase is Phase.WHOLE for life in lives.values()):
        h.step()
    spared = {request_id for request_id, life in lives.items() if life.phase is Phase.WHOLE}
    assert spared
    for request_id in ids:
        if request_id in h.live and request_id not in spared:
            h.abort(request_id)
    h.run()
    h.assert_all_returned()
    assert not spared & {eviction.request_id for eviction in h.evictions}


def test_a_tiny_ratio_does_not_overflow(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=1e-310)
    for i in range(3):
        h.add(text(640, 0) + text(60, i + 1))
    h.run()
    h.assert_all_returned()


@MODES
def test_who_may_not_read_the_cache_does_not_keep_a_copy_whole(tiny_model: Path, asynchronous: bool) -> None:
    """Its blocks are copies of its own, which nobody else can hit while the first ones are there."""
    h = Harness(tiny_model, num_blocks=300, keep=0.2, asynchronous=asynchronous, chunk=2048)
    ids = [h.add(text(640, 0) + text(200, i + 1), max_tokens=60) for i in range(8)]
    h.scheduler.requests[ids[-1]].skip_reading_prefix_cache = True
    h.run()
    h.assert_all_returned()
    shared = {eviction.request_id: eviction.region.shared_blocks for eviction in h.evictions}
    assert shared[ids[1]] == 20 and shared[ids[-1]] == 0

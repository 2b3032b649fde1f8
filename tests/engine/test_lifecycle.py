"""One request from its first chunk to its end: which blocks it holds at each step, for awkward prompt lengths."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from tests.engine.integrity import held_blocks, released

W, N = 32, 32
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
# name of an edge -> prompt tokens
EDGES = {
    "1": 1,
    "2": 2,
    "W-1": W - 1,
    "W": W,
    "W+1": W + 1,
    "2N-1": 2 * N - 1,
    "2N": 2 * N,
    "gN": 20 * N,
    "gN+1": 20 * N + 1,
    "gN-1": 20 * N - 1,
    "chunk": 512,
    "chunk+1": 513,
    "chunk+W-1": 512 + W - 1,
    "max_model_len-1": 1023,
}


@MODES
def test_free_count_rises_by_g_minus_s_at_the_release(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=100, asynchronous=asynchronous, keep=0.25)
    request_id = h.add(text(1000, 0), max_tokens=40)
    g, packed = 1000 // N, 8  # ceil((0.25 * 1000 - 8) / 32) = ceil(7.56)
    h.step()
    assert h.held == 16, "the first chunk of 512 tokens"
    h.step()
    assert len(h.evictions) == 1 and len(h.evictions[0].packing.blocks) == packed
    assert h.held == g + 1 + packed, "all originals, the tail block, and the packed blocks"
    # What a step computed may be overwritten once it has been processed: at once, or a step later.
    if asynchronous:
        h.step()
        assert h.held == g + 1 + packed
    h.step()
    assert h.held == 1 + packed
    assert held_blocks(h.manager, request_id) == 1 + packed
    assert h.manager.lifecycle.totals.freed_blocks == g - packed
    h.run()
    h.assert_all_returned()


@MODES
def test_who_asks_for_one_token_is_left_alone(tiny_model: Path, asynchronous: bool, tmp_path: Path) -> None:
    def evicted(prompt: Any, max_tokens: int, **settings: Any) -> int:
        extra_args = settings.pop("extra_args", None)
        h = Harness(tiny_model, num_blocks=100, asynchronous=asynchronous, **settings)
        h.add(prompt, max_tokens=max_tokens, extra_args=extra_args)
        h.run()
        h.assert_all_returned()
        return len(h.evictions)

    assert evicted(text(600, 0), 1) == 0
    assert evicted(text(600, 0), 2) == 1
    boundary = {"kv_eviction_boundary": 400}
    assert evicted(text(600, 0), 1, extra_args=boundary) == 1, "the rest of the prompt reads what is kept"
    assert evicted(text(600, 0), 1, audit=str(tmp_path)) == 1, "to see what is kept is what an audit is for"


@MODES
def test_growth_takes_one_block_every_n_tokens(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=100, asynchronous=asynchronous, keep=0.25)
    request_id = h.add(text(1000, 0), max_tokens=100)
    while not released(h.manager, request_id):
        h.step()
    while request_id in h.live:
        computed = h.scheduler.requests[request_id].num_computed_tokens
        assert h.held == 8 + -(-computed // N) - 1000 // N
        h.step()
        h.check()
    h.run()
    h.assert_all_returned()


@MODES
@pytest.mark.parametrize("max_tokens", [1, 2, 40])
@pytest.mark.parametrize("edge", EDGES)
def test_prompts_of_every_edge_length_come_and_go(
    tiny_model: Path, edge: str, max_tokens: int, asynchronous: bool
) -> None:
    h = Harness(tiny_model, num_blocks=80, asynchronous=asynchronous, max_model_len=1024, keep=0.2)
    length = EDGES[edge]
    h.add(text(length, 0), max_tokens=max_tokens)
    h.run()
    evicted = length > W and length // N >= 2 and max_tokens > 1
    assert len(h.evictions) == evicted
    if evicted:
        (eviction,) = h.evictions
        assert eviction.region.stop == length
        assert len(eviction.score.source_blocks) == -(-length // N)
        assert 0 < len(eviction.packing.blocks) < length // N
    h.assert_all_returned()


@pytest.mark.parametrize("block_size", [32, 128])
def test_keep_all_moves_every_block(tiny_model: Path, block_size: int) -> None:
    h = Harness(tiny_model, num_blocks=200, block_size=block_size, policy="keep-all")
    for length in (700, 40, 1333, 17, 640):
        h.add(text(length, length % 31))
    h.run()
    moved = {e.region.stop: len(e.packing.blocks) for e in h.evictions}
    assert moved == {t: t // block_size for t in (700, 40, 1333, 640) if t >= block_size}
    h.assert_all_returned()


def test_prompts_below_min_tokens_are_left_alone(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=100, min_tokens=500, keep=0.2)
    for i, length in enumerate((499, 500)):
        h.add(text(length, i))
    h.run()
    assert [e.region.stop for e in h.evictions] == [500]


def test_token_ids_travel_with_the_plan_only_for_an_audit(tiny_model: Path, tmp_path: Path) -> None:
    prompt = text(300, 0)
    for settings, expected in (({}, None), ({"audit": str(tmp_path)}, tuple(prompt))):
        h = Harness(tiny_model, num_blocks=100, **settings)
        h.add(prompt)
        h.run()
        assert h.evictions[0].token_ids == expected


def test_totals_are_what_the_plans_say(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=0.2)
    for i, length in enumerate((1000, 777, 20, 640)):
        h.add(text(length, i))
    h.run()
    totals: Any = h.manager.lifecycle.totals
    assert totals.requests == 3
    assert totals.prompt_tokens == 1000 + 777 + 640
    assert totals.freed_blocks == sum(e.region.stop // N - len(e.packing.blocks) for e in h.evictions)
    assert totals.kept_tokens == sum(len(e.packing.blocks) * N + e.region.stop % N for e in h.evictions)


def test_stats_carry_each_increase_once(tiny_model: Path) -> None:
    from vllm_defensive.compat.channels import take_counts
    from vllm_defensive.serving.prometheus import COUNTERS

    h = Harness(tiny_model, num_blocks=200, keep=0.2)
    for i, length in enumerate((1000, 777)):
        h.add(text(length, i))
        h.run()
    increases = [i.totals for stats in h.stats for i in take_counts(stats) if i.totals is not None]
    sums = {name: sum(getattr(totals, name) for totals in increases) for name in COUNTERS}
    assert sums == {name: getattr(h.manager.lifecycle.totals, name) for name in COUNTERS}
    assert sums["requests"] == 2


@MODES
@pytest.mark.parametrize("max_model_len", [1024, 1025, 1040, 1055])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_every_prompt_fits_a_pool_of_the_size_that_start_up_asks_for(
    tiny_model: Path, keep: float, max_model_len: int, asynchronous: bool
) -> None:
    """The longest prompt is not always the one that needs most: a longer tail block leaves less to pack."""
    arguments: dict[str, Any] = {"max_model_len": max_model_len, "keep": keep, "asynchronous": asynchronous}
    asked = needed_at_start_up(Harness(tiny_model, num_blocks=100, **arguments), max_model_len)
    h = Harness(tiny_model, num_blocks=asked, **arguments)
    for length in (961, 992, 1023, 1024, 1025, max_model_len - 1):
        if length < max_model_len:
            before = len(h.evictions)
            h.add(text(length, length % 97), max_tokens=3)
            h.run(max_steps=20)
            assert len(h.evictions) == before + 1, "computed and evicted once: it was not preempted"
    h.assert_all_returned()


def needed_at_start_up(h: Harness, max_model_len: int) -> int:
    """Blocks that vLLM's memory check demands for the longest request."""
    spec = h.manager.kv_cache_spec
    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len), parallel_config=parallel)
    return spec.max_memory_usage_bytes(config) // spec.page_size_bytes

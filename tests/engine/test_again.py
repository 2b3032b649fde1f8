"""Requests that are evicted as they generate, or as they are read, over pools that are full all the time: nothing
leaks, nothing wrong is read, nobody is thrown out for an eviction's sake, and everybody ends."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from tests.engine.integrity import held_blocks, own_blocks
from vllm_defensive.engine.pins import Pins

SCHEDULING = pytest.mark.parametrize(
    "asynchronous, drafts", [(False, 0), (True, 0), (False, 4)], ids=["sync", "async", "drafts"]
)


def walk(h: Harness, seed: int, steps: int, longest: int, own: Any = lambda rng: None) -> dict[str, int]:
    """Random work; returns what happened. own: fields of a request."""
    rng, happened = random.Random(seed), {"preempted": 0, "most": 0}
    for _ in range(steps):
        if len(h.live) < 7 and rng.random() < 0.3:
            prompt = text(rng.randrange(1, longest), rng.randrange(300))
            h.add(prompt, max_tokens=rng.choice([1, 20, 300, 600]), extra_args=own(rng))
        if h.live and rng.random() < 0.02:
            h.abort(rng.choice(h.live))
        happened["preempted"] += len(h.step().preempted_req_ids or ())
        h.check()
        happened["most"] = max(happened["most"], h.held)
    h.run(9000)
    h.assert_all_returned()
    happened["repeats"] = sum(e.score.since is not None for e in h.evictions)
    return happened


@SCHEDULING
@pytest.mark.parametrize("policy", ["streamingllm", "snapkv", "keep-all"])
def test_answers(tiny_model: Path, policy: str, asynchronous: bool, drafts: int) -> None:
    settings = {"keep": 0.5, "budget": 160, "answers": "evict", "interval": 64}
    arguments = {"asynchronous": asynchronous, "drafts": drafts, "chunk": 96, "max_model_len": 1024}
    h = Harness(tiny_model, num_blocks=30, policy=policy, **arguments, **settings)
    happened = walk(h, seed=drafts, steps=400, longest=200)
    assert happened["repeats"] > 15 and h.manager.lifecycle.totals.cancelled == 0
    assert happened["preempted"] == 0, "they are let in by what they hold at most"
    assert policy == "keep-all" or happened["most"] > 20


def test_who_adopts_is_let_in_by_what_it_holds(tiny_model: Path) -> None:
    """Four behind a document of ten blocks, packed into three: each holds these, or its own, and at most four more."""
    settings = {"budget": 96, "answers": "evict", "interval": 64, "reuse": "boundary"}
    h = Harness(tiny_model, num_blocks=34, policy="streamingllm", max_model_len=1024, **settings)
    document, own = text(320, 400), {"kv_eviction_boundary": 320}
    h.add(document + text(20, 1), max_tokens=2, extra_args=own)
    h.run()
    for seed in range(4):
        h.add(document + text(20, seed), max_tokens=300, extra_args=own)
    h.step()
    assert len(h.scheduler.running) == 4
    while h.live:
        assert not h.step().preempted_req_ids
        h.check()
    h.assert_all_returned()


@pytest.mark.parametrize("widths", ["16", "k8v4"])
@pytest.mark.parametrize("asynchronous, declines", [(False, False), (True, False), (True, True)])
def test_behind_packings_that_others_hold(tiny_model: Path, widths: str, asynchronous: bool, declines: bool) -> None:
    """Documents of 320 tokens that three ask about at a time: what is packed of them stays as it is, whoever packs what
    came behind it into blocks of its own."""
    settings = {"keep": 0.4, "budget": 128, "answers": "evict", "interval": 64, "reuse": "boundary", "widths": widths}
    arguments = {"asynchronous": asynchronous, "chunk": 96, "max_model_len": 1024}
    h = Harness(tiny_model, num_blocks=60, policy="streamingllm", **arguments, **settings)
    rng = random.Random(11)
    for step in range(900):
        if len(h.live) < 5 and rng.random() < 0.3:
            document = text(320, 400 + rng.randrange(3))
            once = {"kv_eviction_answers": "keep"} if rng.random() < 0.2 else {}
            extra = {"kv_eviction_boundary": 320, **once}
            h.add(document + text(rng.randrange(1, 40), step), max_tokens=rng.choice([1, 200, 400]), extra_args=extra)
        if h.live and rng.random() < 0.01:
            h.abort(rng.choice(h.live))
        h.ghost.declines = {name for name in h.live if declines and rng.random() < 0.2}
        h.step()
        h.check()
    totals, library = h.manager.lifecycle.totals, h.manager.lifecycle.library
    assert totals.adoptions > 10 and totals.repeats > 30 and (totals.cancelled > 5) == declines
    assert sum(e.score.since is not None and e.score.since.stop == 320 for e in h.evictions) > 5
    h.run(9000)
    h.assert_all_returned()
    assert not h.manager.lifecycle._in_use and h.manager.lifecycle.packed_blocks == 0
    assert all(
        packing.key.kind.later == (None if packing.eviction.score.later is None else "streamingllm")
        for packing in library._by_key.values()
    )


@pytest.mark.parametrize("shared", [False, True])
def test_who_ends_while_it_is_packed_anew_leaves_nothing(tiny_model: Path, shared: bool) -> None:
    """Neither what it was packed into before, unless that is for others too, nor what it was being packed into: both
    held codes."""
    settings = {"budget": 64, "answers": "evict", "interval": 64, "widths": "k8v4", "asynchronous": True}
    h = Harness(tiny_model, num_blocks=40, policy="streamingllm", max_model_len=1280, **settings)
    request_id = h.add(text(340, 1), max_tokens=300, extra_args={"kv_eviction_boundary": 320} if shared else None)
    lifecycle = h.manager.lifecycle
    while (life := lifecycle.lives.get(request_id)) is None or life.former is None:
        h.step()
    own = {block.block_id for block in own_blocks(life)}
    assert len(own) == (2 if shared else 4) and (life.published is not None) == shared
    h.abort(request_id)
    h.check()
    assert lifecycle.packed_blocks == 0 and own <= set(lifecycle._clear)
    h.add(text(1250, 30), max_tokens=20, extra_args={"kv_eviction": "none"})  # takes every block
    h.run()
    h.assert_all_returned()


@pytest.mark.parametrize("asynchronous, declines", [(False, False), (True, False), (True, True)])
def test_in_fewer_bits(tiny_model: Path, asynchronous: bool, declines: bool) -> None:
    """Beside requests that are packed in 16 bits, or not at all: nobody gets a block with codes in it."""
    settings = {"budget": 64, "answers": "evict", "interval": 64, "widths": "k8v4", "asynchronous": asynchronous}
    h = Harness(tiny_model, num_blocks=40, policy="streamingllm", chunk=96, max_model_len=1024, **settings)
    fields = [None, None, {"kv_eviction_widths": "16"}, {"kv_eviction": "none"}]

    def own(rng: random.Random) -> Any:
        h.ghost.declines = {name for name in h.live if declines and rng.random() < 0.2}
        return rng.choice(fields)

    happened = walk(h, seed=7, steps=500, longest=200, own=own)
    assert happened["repeats"] > 15 and {e.packing.format.widths for e in h.evictions} == {"16", "k8v4"}
    assert (h.manager.lifecycle.totals.cancelled > 3) == declines


@SCHEDULING
def test_prompts_larger_than_the_pool(tiny_model: Path, asynchronous: bool, drafts: int) -> None:
    settings = {"budget": 96, "answers": "evict", "interval": 64, "prompts": "bounded", "prompt_interval": 64}
    arguments = {"asynchronous": asynchronous, "drafts": drafts, "chunk": 96, "max_model_len": 2048}
    h = Harness(tiny_model, num_blocks=16, policy="streamingllm", **arguments, **settings)
    happened = walk(h, seed=drafts + 1, steps=400, longest=1200)
    assert happened["repeats"] > 50 and happened["preempted"] == 0
    assert max(e.region.stop for e in h.evictions) > 2 * 16 * 32, "more than twice the pool"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_peak_of_a_bounded_prompt_is_as_planned(tiny_model: Path, asynchronous: bool) -> None:
    """A budget of 3 blocks, parts of 2: both, what is packed anew, and the block that is being filled."""
    settings = {"budget": 96, "answers": "evict", "interval": 64, "prompts": "bounded", "prompt_interval": 64}
    h = Harness(
        tiny_model, num_blocks=9, policy="streamingllm", asynchronous=asynchronous, max_model_len=2048, **settings
    )
    h.add(text(900, 1), max_tokens=300)
    most = 0
    while h.live:
        h.step()
        h.check()
        most = max(most, h.held)
    assert most <= 3 + 2 + 1 + 3
    stops = [e.region.stop for e in h.evictions]
    assert stops == [*range(128, 897, 64), *range(964, 1200, 64)], "of its prompt, then of its answer"


def test_what_a_later_eviction_needs_is_kept_free(tiny_model: Path) -> None:
    """Two that each hold 5 blocks at most and pack 3: in 12 there is no room for both and an eviction beside."""
    settings = {"budget": 96, "answers": "evict", "interval": 32, "window": 32}
    h = Harness(tiny_model, num_blocks=12, policy="streamingllm", max_model_len=1024, **settings)
    for seed in range(2):
        h.add(text(40, seed), max_tokens=400)
    h.step()
    assert len(h.scheduler.running) == 1
    h.run()
    h.assert_all_returned()
    h = Harness(tiny_model, num_blocks=13, policy="streamingllm", max_model_len=1024, **settings)
    for seed in range(2):
        h.add(text(40, seed), max_tokens=400)
    h.step()
    assert len(h.scheduler.running) == 2
    h.run()


def test_who_is_let_in_leaves_room_for_what_is_not_evicted_yet_and_for_pins(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same two, which nothing is evicted of before 256 tokens: 10 blocks each, at most. And 23 blocks of which one
    is pinned."""
    settings = {"budget": 96, "answers": "evict", "interval": 32, "window": 32, "min_tokens": 256}
    for num_blocks, pinned, running in ((22, 0, 1), (23, 0, 2), (23, 1, 1)):
        monkeypatch.setattr(Pins, "idle_blocks", pinned)
        h = Harness(tiny_model, num_blocks=num_blocks, policy="streamingllm", max_model_len=1024, **settings)
        for seed in range(2):
            h.add(text(40, seed), max_tokens=400)
        h.step()
        assert len(h.scheduler.running) == running, num_blocks


@pytest.mark.parametrize("behind", range(1, 33))
def test_an_eviction_leaves_what_the_next_step_takes(tiny_model: Path, behind: int) -> None:
    """Of a request beside it, which is not evicted, and whose next token may want a block: nobody is thrown out. A step
    ahead, so that what goes back is not there yet."""
    settings = {"budget": 96, "answers": "evict", "interval": 64, "window": 32}
    h = Harness(tiny_model, num_blocks=30, policy="streamingllm", max_model_len=1024, asynchronous=True, **settings)
    own = {"kv_eviction": "none"}
    h.add(text(behind, 2), max_tokens=300, extra_args=own, priority=0)
    first = h.add(text(100, 1), max_tokens=100)
    while h.scheduler.requests[first].num_computed_tokens < 163:
        h.step()
    taken = h.pool.get_new_blocks(h.free - 3)  # what the eviction at 164 takes
    for _ in range(4):
        assert not h.step().preempted_req_ids
    h.pool.free_blocks(taken)
    h.run()
    assert len(h.evictions) > 0


def test_an_eviction_waits_for_room_and_keeps_the_same(tiny_model: Path) -> None:
    """Another request has all other blocks when the first one is due: it goes on, and is packed up to its stop
    later."""
    settings = {"budget": 96, "answers": "evict", "interval": 64, "window": 32}
    h = Harness(tiny_model, num_blocks=16, policy="snapkv", max_model_len=1024, **settings)
    first = h.add(text(100, 1), max_tokens=200)
    for _ in range(60):
        h.step()
    taken = h.pool.get_new_blocks(h.free - 1)  # as if a prompt were being read
    for _ in range(20):
        h.step()
    assert not h.evictions
    h.pool.free_blocks(taken)
    h.step()
    (eviction,) = h.evictions
    assert eviction.region.stop == 164 and eviction.first_reader > 164
    h.run()
    assert h.evictions[1].region.stop == 228 and held_blocks(h.manager, first) == 0


def test_a_worker_that_declines_leaves_what_was_packed(tiny_model: Path) -> None:
    settings = {"budget": 96, "answers": "evict", "interval": 64, "window": 32}
    h = Harness(tiny_model, num_blocks=30, policy="streamingllm", max_model_len=1024, **settings)
    first = h.add(text(100, 1), max_tokens=300)
    while len(h.evictions) < 2:
        h.step()
    h.ghost.declines.add(first)
    for _ in range(70):
        h.step()
        h.check()
    assert len(h.evictions) == 2 and h.manager.lifecycle.totals.cancelled == 1
    h.ghost.declines.clear()
    h.run()
    assert len(h.evictions) > 2 and h.evictions[2].score.since == h.evictions[1].region
    assert [e.repeat for e in h.evictions] == list(range(len(h.evictions)))
    h.assert_all_returned()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["streamingllm", "snapkv"])
@pytest.mark.parametrize("prompt, budget", [(100, 96), (96, 96), (100, 256), (200, 96)])
def test_who_was_thrown_out_passes_its_stops_again(
    tiny_model: Path, prompt: int, budget: int, policy: str, asynchronous: bool
) -> None:
    """Each token sees what it saw before: the same stops, with the same first readers, whatever the prefix cache
    has."""
    settings = {"budget": budget, "answers": "evict", "interval": 64, "window": 32}
    arguments = {"num_blocks": 40, "asynchronous": asynchronous, "chunk": 512, "max_model_len": 1024}
    h = Harness(tiny_model, policy=policy, **arguments, **settings)
    first = h.add(text(prompt, 1), max_tokens=420)
    while len(h.evictions) < 3:
        h.step()
    h.scheduler._preempt_request(h.scheduler.requests[first], 0.0)
    h.scheduler.running.clear()
    h.run()
    h.assert_all_returned()
    assert h.manager.lifecycle.totals.cancelled == 0
    seen = [(e.region.stop, e.first_reader or e.region.stop) for e in h.evictions]
    assert seen[3:6] == seen[:3] and all(reader == stop for stop, reader in seen)


def test_what_cannot_be_served_ends_and_holds_up_nobody(tiny_model: Path) -> None:
    """On a server whose prompts may be larger than its memory, requests whose own fields make theirs too large."""
    settings = {"budget": 96, "answers": "evict", "interval": 64, "prompts": "bounded", "prompt_interval": 64}
    h = Harness(tiny_model, num_blocks=12, policy="streamingllm", max_model_len=2048, **settings)
    for own in (
        {"kv_eviction_keep": 1.0, "kv_eviction_budget": 10**6},
        {"kv_eviction_prompt_interval": 10**6},
        {"kv_eviction_protect": 880},
        {"kv_eviction_boundary": 100},
        {"kv_eviction": "none"},
    ):
        h.add(text(900, 1), max_tokens=50, extra_args=own)
    assert not h.live, "each of them alone takes more than there is"
    grows = h.add(text(100, 3), max_tokens=1000, extra_args={"kv_eviction_interval": 10**6})
    last = h.add(text(900, 2), max_tokens=50)
    h.run()
    h.assert_all_returned()
    assert [e.request_id for e in h.evictions].count(last) > 10
    assert len(h.manager.lifecycle.lives) == 0 and grows not in h.live


def test_all_that_stand_still_give_way(tiny_model: Path) -> None:
    """Two prompts that are read in parts, and blocks that somebody else holds: no eviction finds room."""
    settings = {"budget": 96, "prompts": "bounded", "prompt_interval": 128, "window": 32}
    h = Harness(tiny_model, num_blocks=30, policy="streamingllm", max_model_len=1024, chunk=512, **settings)
    for seed in range(2):
        h.add(text(600, seed), max_tokens=8)
    h.step()
    taken = h.pool.get_new_blocks(h.free)
    preempted = 0
    for _ in range(6):
        preempted += len(h.step().preempted_req_ids or ())
    assert preempted, "or they would wait for each other"
    h.pool.free_blocks(taken)
    h.run()
    h.assert_all_returned()


def test_nobody_is_let_in_while_an_eviction_waits_for_room(tiny_model: Path) -> None:
    """Of requests that are not evicted again: they would take each block that comes free."""
    settings = {"budget": 96, "answers": "evict", "interval": 64, "window": 32}
    h = Harness(tiny_model, num_blocks=16, policy="streamingllm", max_model_len=1024, **settings)
    h.add(text(100, 1), max_tokens=200)
    for _ in range(60):
        h.step()
    taken = h.pool.get_new_blocks(h.free - 2)
    for _ in range(6):
        h.step()
    assert not h.evictions and h.free == 1, "there is no room"
    h.add(text(20, 2), max_tokens=4, extra_args={"kv_eviction": "none"})
    h.step()
    assert len(h.scheduler.running) == 1, "there would be for this one"
    h.pool.free_blocks(taken)
    h.step()
    assert h.evictions
    h.step()
    assert len(h.scheduler.running) == 2
    h.run()
    h.assert_all_returned()

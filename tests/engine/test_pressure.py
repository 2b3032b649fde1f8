"""Requests that are evicted when their memory is wanted, and not before: nobody is thrown out while somebody can give,
those give first that have most, and everybody ends."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from tests.engine.integrity import held_blocks
from tests.engine.test_again import SCHEDULING
from vllm_defensive.engine.life import Phase

FULL: dict[str, Any] = {"when": "full", "keep": 0.25}


def share(h: Harness, request_id: str) -> float:
    """Of its prompt's memory, what a request still holds."""
    packing = h.manager.lifecycle.lives[request_id].packing
    return 1.0 if packing is None else len(packing.blocks) / packing.region.blocks


def run_whole(h: Harness) -> None:
    """To the end; nobody is thrown out on the way."""
    for _ in range(3000):
        if not h.live:
            return
        assert not h.step().preempted_req_ids
        h.check()
    raise AssertionError(f"stuck: {h.live}")


@SCHEDULING
@pytest.mark.parametrize(
    "policy, settings",
    [
        ("streamingllm", {}),
        ("streamingllm", {"answers": "evict", "interval": 64}),
        ("random", {"widths": "k8v4"}),
        ("snapkv", {}),
        ("keep-all", {"widths": "8"}),
    ],
    ids=["streamingllm", "answers", "k8v4", "snapkv", "keep-all"],
)
@pytest.mark.parametrize("declines", [False, True], ids=["", "declines"])
def test_a_pool_that_is_always_full(
    tiny_model: Path, policy: str, settings: dict[str, Any], asynchronous: bool, drafts: int, declines: bool
) -> None:
    """Beside requests that are evicted as they are read, or not at all. Nobody is thrown out while one can give;
    but answers give only what is worth it, and may find no room for that any more."""
    arguments = {"asynchronous": asynchronous, "drafts": drafts, "chunk": 96, "max_model_len": 1024}
    h = Harness(tiny_model, num_blocks=40, policy=policy, **arguments, **{**FULL, **settings})
    rng, lifecycle = random.Random(drafts), h.manager.lifecycle
    fields = [None, None, None, {"kv_eviction_when": "always"}, {"kv_eviction": "none"}]
    for _ in range(400):
        if len(h.live) < 7 and rng.random() < 0.3:
            h.add(
                text(rng.randrange(1, 300), rng.randrange(300)),
                max_tokens=rng.choice([1, 20, 300, 600]),
                extra_args=rng.choice(fields),
            )
        if h.live and rng.random() < 0.02:
            h.abort(rng.choice(h.live))
        h.ghost.declines = {name for name in h.live if declines and rng.random() < 0.5}
        able = [offer for offer in h.manager.pressure._look() if offer.worth]
        left = [offer for offer in able if "answers" not in settings or offer.least <= h.free]
        if h.step().preempted_req_ids:
            assert not left or lifecycle.packing or declines, "somebody could have given"
        h.check()
        assert set(lifecycle.ripe) <= set(lifecycle.lives)
    assert lifecycle.totals.late > (0 if declines else 2)
    assert declines or (lifecycle.totals.repeats > 0) == (policy in ("streamingllm", "random"))
    h.run(9000)
    h.assert_all_returned()
    assert not lifecycle.ripe and (lifecycle.totals.cancelled > 0) == declines


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("policy", ["streamingllm", "snapkv"])
def test_with_memory_enough_steps_are_those_of_stock(tiny_model: Path, policy: str, asynchronous: bool) -> None:
    """Request by request and token by token, with a prompt that comes twice."""
    arguments: dict[str, Any] = {"num_blocks": 400, "chunk": 96, "asynchronous": asynchronous}
    ours, stock = Harness(tiny_model, policy=policy, **arguments, **FULL), Harness(tiny_model, policy=None, **arguments)
    reads_window = policy == "snapkv"
    for seed in (1, 2, 1 if not reads_window else 3):
        for h in (ours, stock):
            h.add(text(200 + 10 * seed, seed), max_tokens=40)
        for _ in range(15):
            assert ours.step().num_scheduled_tokens == stock.step().num_scheduled_tokens
            ours.check()
    while ours.live:
        assert ours.step().num_scheduled_tokens == stock.step().num_scheduled_tokens
    assert not ours.evictions and not stock.live
    assert ours.hits == stock.hits and (max(stock.hits.values()) > 0) == (not reads_window)
    ours.assert_all_returned()


def test_those_give_first_that_have_most_and_nobody_more_than_is_wanted(tiny_model: Path) -> None:
    """Three of nine whole blocks and a bit, in 40. The fourth is let in over the halves of two of them. Then answers
    grow, over the halves of the others; then over quarters; and nobody is packed to less than what is to be kept."""
    h = Harness(tiny_model, num_blocks=40, policy="streamingllm", **{**FULL, "keep": 0.2})
    names = [h.add(text(310, seed), max_tokens=200) for seed in range(3)]
    for _ in range(6):
        h.step()
    assert not h.evictions and len(h.scheduler.running) == 3
    names.append(h.add(text(310, 3), max_tokens=200))
    while len(h.scheduler.running) < 4:
        h.step()
        h.check()
    assert sorted(share(h, name) for name in names) == [pytest.approx(5 / 9)] * 2 + [1.0] * 2
    while h.live:
        before, shares = len(h.evictions), [share(h, name) for name in names if name in h.manager.lifecycle.lives]
        assert not h.step().preempted_req_ids
        h.check()
        for eviction in h.evictions[before:]:
            held = 9 if eviction.score.since is None else [5, 3, 2][eviction.repeat - 1]
            assert len(eviction.packing.blocks) == [5, 3, 2][eviction.repeat] and held / 9 == pytest.approx(max(shares))
    assert {eviction.repeat for eviction in h.evictions} == {0, 1, 2}
    h.assert_all_returned()


def test_who_would_wait_is_let_in_over_what_others_give(tiny_model: Path) -> None:
    """Two of ten blocks in 28: one is asked in the step in which the third finds no room."""
    h = Harness(tiny_model, num_blocks=28, policy="snapkv", **FULL)
    for seed in range(2):
        h.add(text(320, seed), max_tokens=300)
    for _ in range(3):
        h.step()
    assert not h.evictions
    late = h.add(text(200, 5), max_tokens=20)
    h.step()
    assert len(h.scheduler.running) == 2 and len(h.evictions) == 1
    h.step()
    assert late in {request.request_id for request in h.scheduler.running}
    h.run()
    h.assert_all_returned()


def test_what_others_hold_too_is_not_packed(tiny_model: Path) -> None:
    """Six blocks of two prompts are the same ones: they would not come free."""
    h = Harness(tiny_model, num_blocks=30, policy="streamingllm", **FULL)
    common = text(192, 9)
    h.add(common + text(160, 0), max_tokens=400)
    h.step()
    second = h.add(common + text(160, 1), max_tokens=400)
    h.step()
    assert h.hits[second] == 192 and not h.evictions
    h.add(text(320, 5), max_tokens=100)
    while not h.evictions:
        h.step()
    assert {e.region.shared_blocks for e in h.evictions} == {6}
    h.run()
    h.assert_all_returned()


def test_answers_that_outgrow_the_memory_together(tiny_model: Path) -> None:
    """Four of 900 tokens in memory for 1,280, from prompts that are too short to be evicted themselves."""
    settings = {"when": "full", "keep": 0.15, "answers": "evict", "interval": 128}
    h = Harness(tiny_model, num_blocks=40, policy="streamingllm", max_model_len=1024, **settings)
    for seed in range(4):
        h.add(text(20, seed), max_tokens=900)
    run_whole(h)
    assert {e.region.stop > 300 for e in h.evictions} == {False, True}
    for name in {e.request_id for e in h.evictions}:
        own = [e for e in h.evictions if e.request_id == name]
        for before, after in itertools.pairwise(own):
            held = len(before.packing.blocks) + after.region.full_blocks - before.region.full_blocks
            assert held - len(after.packing.blocks) >= 128 // 32, "what an interval takes, at least"
    h.assert_all_returned()


def test_a_request_says_what_became_of_it(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=24, policy="snapkv", **FULL)
    name = h.add(text(320, 1), max_tokens=300, extra_args={"kv_eviction_report": 1})
    h.step()
    h.step()
    assert h.manager.lifecycle.report(name)["policy"] == "none"
    h.add(text(350, 2), max_tokens=2)
    while not h.manager.lifecycle.totals.late:
        h.step()
    told = h.manager.lifecycle.report(name)
    assert told["policy"] == "snapkv" and told["evictions"] == 1 and told["held_tokens"] < 120
    assert held_blocks(h.manager, name) < 8


def test_nobody_gives_for_who_would_wait_all_the_same(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=40, policy="streamingllm", **FULL)
    for seed in range(2):
        h.add(text(310, seed), max_tokens=100)
    for _ in range(3):
        h.step()
    h.add(text(1000, 3), max_tokens=2)
    while len(h.scheduler.running) == 2:
        assert not h.step().preempted_req_ids
        h.check()
    assert not h.evictions, "of two prompts of ten blocks, fourteen would be left at best"
    h.run()
    h.assert_all_returned()


def test_a_step_with_room_for_all_looks_at_nobody(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h = Harness(tiny_model, num_blocks=200, policy="streamingllm", **FULL)
    for seed in range(4):
        h.add(text(310, seed), max_tokens=150)
    for _ in range(8):
        h.step()
    looks = []
    look = h.manager.pressure._look
    monkeypatch.setattr(h.manager.pressure, "_look", lambda: looks.append(1) or look())
    for _ in range(64):
        h.step()
    assert len(looks) == 2 and not h.evictions, "once a block"
    h.run()
    h.assert_all_returned()


@pytest.mark.parametrize("answers", ["keep", "evict"])
def test_of_who_comes_in_one_step_each_leaves_what_others_are_packed_into(tiny_model: Path, answers: str) -> None:
    """One that can give much, and one that can give nothing and would take the room for that."""
    h = Harness(
        tiny_model, num_blocks=42, policy="streamingllm", chunk=2048, max_model_len=1120, answers=answers, **FULL
    )
    h.add(text(1000, 1), max_tokens=100)
    h.add(text(100, 2), max_tokens=100, extra_args={"kv_eviction": "none"})
    run_whole(h)
    assert h.evictions
    h.assert_all_returned()


def test_room_is_left_for_who_is_still_read(tiny_model: Path) -> None:
    """For eight blocks, a quarter of 1,000 tokens, whoever ends meanwhile."""
    h = Harness(tiny_model, num_blocks=60, policy="streamingllm", chunk=96, **FULL)
    short, long = h.add(text(50, 1), max_tokens=3), h.add(text(1000, 2), max_tokens=3)
    while short in h.live:
        h.step()
    h.step()
    assert h.manager.lifecycle.lives[long].ahead and h.manager.pressure._reserve == 8
    h.run()
    h.assert_all_returned()


def test_answers_give_what_an_interval_takes_or_nothing(tiny_model: Path) -> None:
    settings = {**FULL, "keep": 0.15, "answers": "evict", "interval": 128}
    h = Harness(tiny_model, num_blocks=40, policy="streamingllm", max_model_len=1024, **settings)
    for seed in range(4):
        h.add(text(20, seed), max_tokens=900)
    while not h.manager.lifecycle.totals.late:
        h.step()
    name, worth = h.evictions[0].request_id, []
    while len(h.evictions) < 12:
        worth += [offer.worth for offer in h.manager.pressure._look() if offer.life.request.request_id == name]
        h.step()
    assert not worth[0] and any(worth), "five blocks are left, of which two would do; later it is more"
    h.run()
    h.assert_all_returned()


@pytest.mark.parametrize("beside", [{"states": 2}, {"chunks": 1}], ids=["states", "chunks"])
def test_beside_other_layers_who_would_wait_is_let_in_too(tiny_model: Path, beside: dict[str, int]) -> None:
    """What it takes of their blocks is wanted as well."""
    h = Harness(tiny_model, num_blocks=60, policy="streamingllm", chunk=96, **beside, **FULL)
    for seed in range(6):
        h.add(text(320, seed), max_tokens=60)
    while h.live:
        assert not h.step().preempted_req_ids
        h.check()
        held = h.manager.lifecycle.lives
        if len(h.live) > len(h.scheduler.running) and not h.manager.lifecycle.packing:
            ripe = [life for life in held.values() if life.phase is Phase.WHOLE and life.request.num_output_tokens > 8]
            assert len(ripe) < 2, "somebody waits, and two that could give have not been asked"
    assert len(h.evictions) > 2
    h.assert_all_returned()


def test_who_can_give_nothing_is_asked_for_no_room_to_give(tiny_model: Path) -> None:
    """A prompt of 32 blocks in 38 can never be packed, which would take 8 more; it is served all the same."""
    settings = {**FULL, "answers": "evict", "interval": 64}
    h = Harness(tiny_model, num_blocks=38, policy="streamingllm", max_model_len=1120, **settings)
    h.add(text(1000, 1), max_tokens=4)
    h.run(60)
    assert not h.evictions
    h.assert_all_returned()

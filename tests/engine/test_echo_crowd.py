"""Echoes among others: who waits for whom, who gives way, and that all come to their end."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.v1.core.sched.interface import PauseState

from tests.engine.echoes import MODES, echoes, preempt, until
from tests.engine.harness import Harness, text
from vllm_defensive.engine.life import Phase


@MODES
def test_an_echo_needs_no_slot_of_those_that_wait_for_it(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, asynchronous=asynchronous, max_num_seqs=2)
    for i in range(5):
        h.add(text(400, i), max_tokens=40)
    most = 0
    while h.scheduler.has_requests():
        output = h.step()
        h.check()
        most = max(most, sum("-echo-" not in r for r in output.num_scheduled_tokens))
    assert most == 2, "and lets nobody else in"
    assert len(h.evictions) == 5
    h.assert_all_returned()


@MODES
@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_a_request_may_end_in_the_middle_of_its_echo(tiny_model: Path, asynchronous: bool, end: str) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="echokv", keep=0.2, asynchronous=asynchronous, chunk=100)
    request_id = h.add(text(500, 0), max_tokens=40)
    until(h, request_id, Phase.ECHOING)
    for _ in range(3):
        h.step()
    if end == "abort":
        h.abort(request_id)
    else:
        preempt(h, request_id)
    h.step()
    h.check()
    assert not echoes(h), "nobody is there for whom it speaks"
    h.run()
    assert len(h.evictions) == (end == "preempt")
    h.assert_all_returned()


@MODES
@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_echo_that_loses_its_blocks_is_followed_by_another(tiny_model: Path, asynchronous: bool, after: int) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="echokv", keep=0.2, asynchronous=asynchronous, chunk=100)
    request_id = h.add(text(400, 0), max_tokens=40)
    until(h, request_id, Phase.ECHOING)
    for _ in range(after):
        h.step()
    for echo in echoes(h):
        preempt(h, echo)
    h.check()
    h.run()
    assert [e.request_id for e in h.evictions] == [request_id]
    h.assert_all_returned()


@MODES
def test_two_that_wait_for_memory_do_not_wait_for_ever(tiny_model: Path, asynchronous: bool) -> None:
    """Both prompts fit, with their packed blocks; an echo of 400 tokens beside them does not."""
    h = Harness(tiny_model, num_blocks=36, policy="echokv", keep=0.2, asynchronous=asynchronous, max_model_len=900)
    both = [h.add(text(400, i), max_tokens=40) for i in range(2)]
    steps: dict[str, int] = {}
    for step in range(300):
        if not h.scheduler.has_requests():
            break
        for request_id in (h.step().preempted_req_ids or set()) & set(both):
            steps[request_id] = step
        h.check()
    assert list(steps) == [both[1]], "the last one made way"
    assert sorted(e.request_id for e in h.evictions) == both
    h.assert_all_returned()


@MODES
@pytest.mark.parametrize("waits", [False, True], ids=["runs", "waits"])
def test_a_forced_reset_of_the_prefix_cache_ends_an_echo(tiny_model: Path, asynchronous: bool, waits: bool) -> None:
    """One that waits for memory holds the served request's blocks meanwhile."""
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, asynchronous=asynchronous, chunk=450)
    request_id = h.add(text(400, 0), max_tokens=40)
    h.add(text(40, 1), max_tokens=20, extra_args={"kv_eviction": "none"})  # decodes, and takes no block
    until(h, request_id, Phase.ECHOING)
    taken = h.pool.get_new_blocks(h.free) if waits else []
    h.step()
    assert len(echoes(h)) == 1 and h.scheduler._echoes.waiting == waits
    h.pool.free_blocks(taken)
    h.scheduler.reset_prefix_cache(reset_running_requests=True)
    h.run()
    assert [e.request_id for e in h.evictions] == [request_id]
    h.assert_all_returned()


@MODES
def test_no_echo_begins_while_the_engine_is_paused(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, asynchronous=asynchronous, chunk=100)
    request_id = h.add(text(400, 0), max_tokens=40)
    until(h, request_id, Phase.ECHOING)
    h.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(3):
        h.step()
    assert not echoes(h)
    h.scheduler.reset_prefix_cache(reset_running_requests=True)
    h.scheduler.set_pause_state(PauseState.UNPAUSED)
    h.run()
    assert [e.request_id for e in h.evictions] == [request_id]
    h.assert_all_returned()


def test_a_step_without_tokens_is_not_always_one_without_memory(tiny_model: Path) -> None:
    """Somebody was thrown out in it, after which vLLM lets nobody in: there is room for the echo in the next."""
    h = Harness(tiny_model, num_blocks=37, policy="kvzip", keep=0.2, max_model_len=900)
    small = h.add(text(40, 1), max_tokens=300, extra_args={"kv_eviction": "none"})
    h.step()
    request_id = h.add(text(500, 0), max_tokens=200)
    h.run()
    assert [e.request_id for e in h.evictions if e.request_id == request_id]
    assert h.manager.lifecycle.totals.cancelled == 0
    assert small not in h.scheduler.requests
    h.assert_all_returned()


def test_by_priority_an_echo_goes_before_the_request_that_it_serves(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, chunk=100, scheduling="priority")
    request_id = h.add(text(500, 0), max_tokens=40, priority=5)
    until(h, request_id, Phase.ECHOING)
    h.step()
    (echo,) = echoes(h)
    both = [h.scheduler.requests[r] for r in (request_id, echo)]
    assert max(both, key=lambda r: (r.priority, r.arrival_time)) is both[1], "as vLLM chooses whom to throw out"
    h.run()
    h.assert_all_returned()


def test_nobody_comes_in_while_an_echo_waits(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2)
    request_id = h.add(text(400, 0), max_tokens=40)
    h.add(text(40, 2), max_tokens=20, extra_args={"kv_eviction": "none"})  # decodes, and takes no block
    until(h, request_id, Phase.ECHOING)
    taken = h.pool.get_new_blocks(h.free - 3)
    h.step()
    assert h.scheduler._echoes.waiting
    late = h.add(text(40, 1), max_tokens=4, extra_args={"kv_eviction": "none"})
    h.step()
    assert late not in h.manager.lifecycle.lives, "three blocks are free, and it needs two"
    h.pool.free_blocks(taken)
    h.run()
    h.assert_all_returned()


def test_only_so_many_wait_for_echoes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_defensive.engine.echo.ECHO_REQUESTS", 3)
    h = Harness(tiny_model, num_blocks=600, policy="echokv", keep=0.2, chunk=2048)
    for i in range(8):
        h.add(text(400, i), max_tokens=4)
    most = 0
    while h.scheduler.has_requests():
        h.step()
        h.check()
        lives = h.manager.lifecycle.lives.values()
        most = max(most, sum(life.echo_tokens > 0 and life.phase in (Phase.PREFILL, Phase.ECHOING) for life in lives))
    assert most == 3 and len(h.evictions) == 8
    h.assert_all_returned()

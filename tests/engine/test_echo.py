"""Echoes: a document is repeated in steps of their own, which cost others no more than a chunk of prefill, and are
gone when it is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState

from tests.engine.harness import Harness, text
from tests.engine.integrity import held_blocks, released
from vllm_defensive import packing
from vllm_defensive.engine.life import Phase
from vllm_defensive.packing import ECHO_OVERHEAD, ECHO_TOKENS, echo_tokens

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def phase(h: Harness, request_id: str) -> Phase:
    return h.manager.lifecycle.lives[request_id].phase


def until(h: Harness, request_id: str, wanted: Phase) -> None:
    for _ in range(100):
        if request_id in h.manager.lifecycle.lives and phase(h, request_id) is wanted:
            return
        h.step()
        h.check()
    raise AssertionError(f"{request_id} was never {wanted.name}")


def echoes(h: Harness) -> list[str]:
    return [request_id for request_id in h.live if "-echo-" in request_id]


@MODES
def test_the_prompt_is_repeated_over_its_own_blocks_then_packed(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=200, policy="echokv", keep=0.2, asynchronous=asynchronous, chunk=128)
    request_id = h.add(text(500, 0), max_tokens=60)
    until(h, request_id, Phase.ECHOING)
    h.step()
    (echo,) = echoes(h)
    said = h.tokens(echo)
    assert said[:500] == text(500, 0) and said[-501:-1] == text(500, 0)
    assert len(said) - 1000 < ECHO_OVERHEAD
    assert h.manager.req_to_blocks[echo][:16] == h.manager.req_to_blocks[request_id][:16], "no copy"
    h.run()
    assert [e.policy for e in h.evictions] == ["echokv"]
    totals = h.manager.lifecycle.totals
    assert totals.echo_tokens == len(said) - 1 - 500, "the answer that vLLM draws is none of them"
    assert totals.cancelled == 0
    h.assert_all_returned()


@MODES
def test_a_long_prompt_is_repeated_part_by_part(
    tiny_model: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ECHO_TOKENS", 300)
    h = Harness(tiny_model, num_blocks=200, policy="kvzip", keep=0.2, asynchronous=asynchronous)
    prompt = text(400, 0)
    request_id = h.add(prompt, max_tokens=40)
    until(h, request_id, Phase.PACKED)
    parts = sorted(r for r in h._tokens_of if "-echo-" in r)
    first, second = (h.tokens(r)[len(prompt) : -1] for r in parts)
    assert first[-300:] == prompt[:300]
    assert second[-108:] == prompt[292:], "it begins with the tokens before its part"
    h.run()
    h.assert_all_returned()


@MODES
def test_others_decode_in_every_step_of_an_echo(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, asynchronous=asynchronous, chunk=100)
    other = h.add(text(40, 1), max_tokens=200, extra_args={"kv_eviction": "none"})
    h.step()
    h.step()
    request_id = h.add(text(900, 0), max_tokens=40)
    until(h, request_id, Phase.ECHOING)
    steps = 0
    while phase(h, request_id) is Phase.ECHOING:
        output = h.step()
        steps += 1
        assert output.num_scheduled_tokens[other] == 1 and output.total_num_scheduled_tokens <= 100
        assert request_id not in output.num_scheduled_tokens, "it stands still"
    assert steps > 9
    h.run()
    h.assert_all_returned()


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


def preempt(h: Harness, request_id: str) -> None:
    request = h.scheduler.requests[request_id]
    h.scheduler.running.remove(request)
    h.scheduler._preempt_request(request, 0.0)


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


def test_where_positions_run_out_the_window_decides(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, max_model_len=1024)
    report: dict[str, Any] = {"kv_eviction_report": 1}
    short, long = (h.add(text(n, n), max_tokens=20, extra_args=report) for n in (700, 950))
    until(h, long, Phase.PACKED)
    assert h.manager.lifecycle.report(long)["policy"] == "halokv"
    until(h, short, Phase.PACKED)
    assert h.manager.lifecycle.report(short)["policy"] == "kvzip"
    parts = [r for r in h._tokens_of if r.startswith(f"{short}-echo-")]
    assert len(parts) == -(-700 // (1024 - 700 - ECHO_OVERHEAD)), "parts shrink to what is left"
    h.run()
    h.assert_all_returned()


def test_a_boundary_is_the_end_of_what_is_repeated(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="echokv", keep=0.2)
    request_id = h.add(text(600, 0), max_tokens=20, extra_args={"kv_eviction_boundary": 501})
    until(h, request_id, Phase.ECHOING)
    h.step()
    (echo,) = echoes(h)
    assert h.tokens(echo)[:501] == text(600, 0)[:501] and h.tokens(echo)[-502:-1] == text(600, 0)[:501]
    h.run()  # the ghost compares what the question reads, and where
    assert h.evictions[0].region.stop == 501
    h.assert_all_returned()


@MODES
def test_the_second_of_two_equal_documents_is_repeated_though_it_is_in_the_prefix_cache(
    tiny_model: Path, asynchronous: bool
) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, asynchronous=asynchronous)
    first = h.add(text(500, 0), max_tokens=20)
    h.run()
    second = h.add(text(500, 0), max_tokens=20)
    until(h, second, Phase.PACKED)
    assert h.hits[first] == 0 and h.hits[second] >= 448
    assert held_blocks(h.manager, second) < 8 and released(h.manager, second)
    h.run()
    h.assert_all_returned()


@pytest.mark.parametrize(
    "stop, longest, tokens",
    [
        (1000, 8192, ECHO_TOKENS),
        (8192 - ECHO_OVERHEAD - 100, 8192, 100),
        (8192 - ECHO_OVERHEAD - 63, 8192, 0),
        (40, 40 + ECHO_OVERHEAD + 40, 40),
        (40, 40 + ECHO_OVERHEAD + 39, 0),
    ],
)
def test_how_much_is_repeated_at_once(stop: int, longest: int, tokens: int) -> None:
    assert echo_tokens(stop, longest) == tokens


def test_an_echo_is_nobodys_request_in_vllms_gauges(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, chunk=100)
    request_id = h.add(text(500, 0), max_tokens=40)
    until(h, request_id, Phase.ECHOING)
    h.step()
    assert echoes(h) and (h.stats[-1].num_running_reqs, h.stats[-1].num_waiting_reqs) == (1, 0)


@MODES
@pytest.mark.parametrize("blocks", [300, 22], ids=["runs", "waits"])
def test_a_forced_reset_of_the_prefix_cache_ends_an_echo(tiny_model: Path, asynchronous: bool, blocks: int) -> None:
    """In the small pool the echo waits for memory, and holds the served request's blocks meanwhile."""
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, asynchronous=asynchronous, chunk=450)
    request_id = h.add(text(400, 0), max_tokens=40)
    h.add(text(40, 1), max_tokens=20, extra_args={"kv_eviction": "none"})  # decodes, and takes no block
    until(h, request_id, Phase.ECHOING)
    taken = h.pool.get_new_blocks(h.free) if blocks == 22 else []
    h.step()
    assert len(echoes(h)) == 1 and (h.scheduler._echoes.waiting == bool(taken))
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

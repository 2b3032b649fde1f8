"""Memory that eviction frees is used: more requests run at once, and those that lose theirs start cleanly again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.harness import Harness, text
from vllm_defensive.compat import channels

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def most_at_once(h: Harness) -> int:
    """Run 16 prompts of 1,000 tokens and return how many ran together at most."""
    for i in range(16):
        h.add(text(1000, i), max_tokens=64)
    most = 0
    while h.scheduler.has_requests():
        output = h.step()
        assert not output.preempted_req_ids or h.eviction is None
        h.check()
        most = max(most, len(h.scheduler.running))
    h.assert_all_returned()
    return most


@MODES
def test_sixteen_prompts_run_where_stock_runs_six(tiny_model: Path, asynchronous: bool) -> None:
    pool = {"num_blocks": 200, "asynchronous": asynchronous}
    assert most_at_once(Harness(tiny_model, policy=None, **pool)) == 6
    assert most_at_once(Harness(tiny_model, keep=0.25, **pool)) == 16


@MODES
def test_admission_counts_the_packed_blocks(tiny_model: Path, asynchronous: bool) -> None:
    """A prompt of 32 blocks that packs 16 waits for 48: it is never admitted to be thrown out at its end."""
    h = Harness(tiny_model, num_blocks=60, keep=0.5, asynchronous=asynchronous)
    h.add(text(500, 0), max_tokens=200)  # 8 packed and 1 tail block when evicted, 7 of growth in the end
    for _ in range(4):
        h.step()
    assert h.held in (9, 10)
    waiting = h.add(text(1024, 1))
    h.step()
    assert waiting in {r.request_id for r in h.scheduler.running}, "51 blocks are free"
    h.run()
    h = Harness(tiny_model, num_blocks=56, keep=0.5, asynchronous=asynchronous)
    h.add(text(500, 0), max_tokens=200)
    for _ in range(4):
        h.step()
    waiting = h.add(text(1024, 1))
    h.step()
    assert waiting not in {r.request_id for r in h.scheduler.running}, "46 or 47 are"
    h.run()
    h.assert_all_returned()


@MODES
@pytest.mark.parametrize("scheduling", ["fcfs", "priority"])
def test_a_request_that_was_thrown_out_is_evicted_at_the_same_place_again(
    tiny_model: Path, scheduling: str, asynchronous: bool
) -> None:
    h = Harness(
        tiny_model, num_blocks=40, keep=0.5, asynchronous=asynchronous, scheduling=scheduling, max_model_len=1024
    )
    for i in range(4):
        h.add(text(300, i), max_tokens=400, priority=i)  # together their answers outgrow the pool
    preempted: set[str] = set()
    while h.scheduler.has_requests():
        output = h.step()
        preempted |= set(output.preempted_req_ids or ())
        h.check()
    assert preempted
    for request_id in preempted:
        lengths = [e.region.stop for e in h.evictions if e.request_id == request_id]
        assert len(lengths) > 1 and set(lengths) == {300}, "its answer so far is computed from what was kept, as before"
    h.assert_all_returned()


def test_a_plan_is_dropped_if_its_request_is_thrown_out_in_the_same_pass(tiny_model: Path) -> None:
    """The last free blocks go to the end of a prefill; then a more important request needs one more."""
    h = Harness(
        tiny_model, num_blocks=16, keep=0.5, scheduling="priority", chunk=96, long_prefill=64, max_model_len=320
    )
    minor = h.add(text(319, 0), max_tokens=2, priority=1)
    h.step()  # alone, so that it comes first in every later pass
    major = h.add(text(30, 1), max_tokens=9, priority=0)  # it needs its second block in step 5, when `minor` is done
    for _ in range(3):
        h.step()
        h.check()
    assert h.free == 16 - 9 - 1
    assert h.scheduler.requests[minor].num_computed_tokens == 288
    planned = []
    pack = h.manager.lifecycle.pack
    h.manager.lifecycle.pack = lambda life, *args: (planned.append(life.request.request_id), pack(life, *args))
    output = h.step()
    h.check()
    assert planned == [minor]
    assert output.preempted_req_ids == {minor} and major in output.num_scheduled_tokens
    assert channels.read_message(output).evictions == []
    h.run()
    assert [e.request_id for e in h.evictions] == [minor]
    h.assert_all_returned()


@MODES
def test_aborts_at_every_step_of_a_requests_life_return_everything(tiny_model: Path, asynchronous: bool) -> None:
    for step in range(1, 12):
        h = Harness(tiny_model, num_blocks=100, asynchronous=asynchronous, chunk=128)
        request_id = h.add(text(600, 0), max_tokens=6)
        for _ in range(step):
            h.step()
        h.abort(request_id)
        h.check()
        assert h.free == h.num_blocks
        h.run()
        h.assert_all_returned()


def test_an_unknown_manager_evicts_nothing(tiny_model: Path) -> None:
    """Without the scheduler's requests (as in vLLM's own use of a manager) ours is a stock one."""
    h = Harness(tiny_model, num_blocks=100)
    h.manager.requests = {}
    h.add(text(600, 0))
    h.run()
    assert h.evictions == []
    h.assert_all_returned()


def test_memory_is_given_back_before_others_are_thrown_out_for_want_of_it(tiny_model: Path) -> None:
    """The first in line needs a block in the very pass in which the second, whose turn is later, has some to spare."""
    h = Harness(tiny_model, num_blocks=25, keep=0.25, scheduling="priority", max_model_len=1024)
    first = h.add(text(62, 0), max_tokens=80, priority=0)
    h.step()
    second = h.add(text(600, 1), max_tokens=80, priority=1)
    h.step()
    h.step()
    assert h.free == 0, "2 blocks of the first, 19 of the second and its 4 packed ones"
    output = h.step()
    assert not output.preempted_req_ids and {first, second} <= set(output.num_scheduled_tokens)
    assert h.held == 3 + 1 + 4
    h.run()
    h.assert_all_returned()

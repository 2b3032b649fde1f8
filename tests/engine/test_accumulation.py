"""A request whose policy sums the attention of all queries computes every one of them, and tells the workers from its
first chunk on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.harness import Harness, text

pytestmark = pytest.mark.e2e


def spans(harness: Harness, steps: int = 200) -> list[tuple[str, int, int]]:
    """(request, first token, end) of each row of a step whose workers were told to sum, until nobody is left."""
    from vllm_defensive.compat.channels import read_message

    found = []
    for _ in range(steps):
        if not harness.scheduler.has_requests():
            break
        output = harness.step()
        harness.check()
        message = read_message(output)
        assert not message.observe, "the window's queries alone are of no use"
        done = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        done |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, stop in message.accumulate.items():
            end = done[request_id] + output.num_scheduled_tokens[request_id]
            assert end <= stop
            found.append((request_id, done[request_id], end))
    return found


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_query_passes_and_nothing_is_hit(tiny_model: Any, asynchronous: bool) -> None:
    harness = Harness(tiny_model, num_blocks=100, policy="h2o", chunk=128, asynchronous=asynchronous)
    prompt = text(300, 1)
    for _ in range(2):
        request = harness.add(prompt)
        assert spans(harness) == [(request, 0, 128), (request, 128, 256), (request, 256, 300)]
        assert harness.hits[request] == 0
    assert len(harness.evictions) == 2
    harness.assert_all_returned()


def test_it_shares_no_blocks_with_others_of_the_same_prompt(tiny_model: Any) -> None:
    """It has blocks of its own, so leaving some whole would save no memory; the others share the whole prompt."""
    harness = Harness(tiny_model, num_blocks=400, keep=0.5, chunk=512)
    ids = [harness.add(text(320, 1)) for _ in range(4)]
    for request_id in ids[:2]:
        harness.scheduler.requests[request_id].sampling_params.extra_args = {"kv_eviction": "h2o"}
    harness.run()
    assert [(e.request_id, e.region.shared_blocks) for e in harness.evictions] == [(ids[0], 0), (ids[1], 0)]
    harness.assert_all_returned()


def test_a_request_preempted_on_the_way_begins_anew(tiny_model: Any) -> None:
    """Nothing of its own blocks, which the prefix cache still has, is hit; the ghost worker counts its queries."""
    harness = Harness(
        tiny_model,
        num_blocks=16,
        policy="h2o",
        keep=0.5,
        scheduling="priority",
        chunk=96,
        long_prefill=32,
        max_model_len=320,
    )
    minor = harness.add(text(319, 0), max_tokens=2, priority=1)
    harness.step()
    harness.add(text(200, 1), max_tokens=9, priority=0)
    rows = [(begin, end) for request_id, begin, end in spans(harness) if request_id == minor and begin < 319]
    again = [begin for begin, _ in rows].index(0)
    assert rows[again - 1][1] == 288, "it was not preempted on the way, so the test shows nothing"
    assert rows[again:] == [(0, 96), (96, 192), (192, 288), (288, 319)]
    assert [e.region.stop for e in harness.evictions] == [200, 319]
    harness.assert_all_returned()


def test_what_is_too_short_to_evict_is_left_alone(tiny_model: Any) -> None:
    harness = Harness(tiny_model, num_blocks=100, policy="h2o", min_tokens=301)
    harness.add(text(300, 1))
    assert spans(harness) == []
    request = harness.add(text(300, 1))
    harness.run()
    assert harness.hits[request] > 0 and not harness.evictions

"""A request whose policy sums the attention of all queries computes every one of them, and tells the workers from its
first chunk on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.harness import Harness, text

pytestmark = pytest.mark.e2e


def spans(harness: Harness, steps: int = 200) -> list[tuple[str, int, int]]:
    """(request, first token, end) of each row of a step whose workers were told to sum, until nobody is left."""
    from vllm_defensive.vllm_compat import read_message

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
        for request_id, num_tokens in message.accumulate.items():
            end = done[request_id] + output.num_scheduled_tokens[request_id]
            assert end <= num_tokens
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


def test_others_of_the_same_prompt_share_nothing_with_it(tiny_model: Any) -> None:
    """It has blocks of its own, so leaving leading ones whole would save no memory."""
    harness = Harness(tiny_model, num_blocks=400, policy="h2o", keep=0.5)
    for _ in range(4):
        harness.add(text(320, 1))
    harness.run()
    assert [e.shared_blocks for e in harness.evictions] == [0] * 4
    harness.assert_all_returned()


def test_what_is_too_short_to_evict_is_left_alone(tiny_model: Any) -> None:
    harness = Harness(tiny_model, num_blocks=100, policy="h2o", min_tokens=301)
    harness.add(text(300, 1))
    assert spans(harness) == []
    request = harness.add(text(300, 1))
    harness.run()
    assert harness.hits[request] > 0 and not harness.evictions

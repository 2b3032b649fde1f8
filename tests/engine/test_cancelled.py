"""An eviction that the workers do not carry out costs its request the saving, and nobody else anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.harness import Harness, text
from tests.engine.integrity import held_blocks, released
from vllm_defensive.engine.life import Phase

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@MODES
def test_the_request_goes_on_over_its_originals_and_the_others_are_evicted(
    tiny_model: Path, asynchronous: bool
) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=0.2, asynchronous=asynchronous)
    declined, other = (h.add(text(500, i), max_tokens=90) for i in range(2))
    h.ghost.declines.add(declined)
    while not released(h.manager, other):
        h.step()
        h.check()
    life = h.manager.lifecycle.lives[declined]
    assert life.phase is Phase.WHOLE and life.packing is None
    assert held_blocks(h.manager, declined) == len(h.manager.req_to_blocks[declined])
    h.step()
    totals = h.manager.lifecycle.totals
    assert (totals.requests, totals.cancelled) == (1, 1), "what was declined is not counted as done"
    h.run()  # the ghost compares every read with the full context
    assert [eviction.request_id for eviction in h.evictions] == [other]
    h.assert_all_returned()


@MODES
def test_what_is_computed_after_it_is_cached_as_of_any_other_request(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=0.2, asynchronous=asynchronous)
    declined = h.add(text(500, 0), max_tokens=90)
    h.ghost.declines.add(declined)
    h.run()
    again = h.add(h.tokens(declined) + text(100, 1))
    h.run()
    # All of it but the tokens of the last step, of which nobody computed the next.
    assert h.hits[again] == (500 + 90 - 1) // 32 * 32
    h.assert_all_returned()


@MODES
def test_a_request_that_ended_meanwhile_is_not_missed(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=0.2, asynchronous=asynchronous)
    request_id = h.add(text(400, 0), max_tokens=90)
    h.step()
    eviction = h.manager.lifecycle.lives[request_id].eviction
    assert eviction is not None
    h.abort(request_id)
    h.manager.cancel(eviction)
    h.run()
    h.assert_all_returned()
    assert h.manager.lifecycle.totals.cancelled == 0


def test_a_late_refusal_is_not_of_the_next_eviction(tiny_model: Path) -> None:
    """Thrown out and back in between a step and its processing, the request is evicted anew by then."""
    h = Harness(tiny_model, num_blocks=200, keep=0.2, asynchronous=True)
    request_id = h.add(text(400, 0), max_tokens=60)
    h.ghost.declines.add(request_id)
    while request_id not in h.ghost.cancelled:
        h.step()
    h.ghost.declines.clear()
    assert h.scheduler.reset_prefix_cache(reset_running_requests=True)
    while not h.evictions:
        h.step()
        h.check()
    for seed in range(5, 8):  # they would be given the blocks of one that is not taken for evicted
        h.add(text(500, seed), max_tokens=30)
    h.run()
    assert len(h.evictions) == 4 and h.manager.lifecycle.totals.cancelled == 0
    h.assert_all_returned()

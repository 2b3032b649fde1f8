"""Sessions that stream their input are never evicted, and hold their blocks while they wait for more of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.v1.request import RequestStatus

from tests.engine.harness import Harness, text
from tests.engine.integrity import held_blocks

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@MODES
@pytest.mark.parametrize("admission", ["eager", "steady"])
def test_a_prompt_that_does_not_fit_beside_an_idle_session_is_served_whole(
    tiny_model: Path, asynchronous: bool, admission: str
) -> None:
    """Originals and packed blocks together would need what the session does not give back."""
    h = Harness(tiny_model, num_blocks=40, keep=0.3, asynchronous=asynchronous, admission=admission)
    session = h.add(text(300, 0), max_tokens=2, resumable=True)
    while h.scheduler.requests[session].status is not RequestStatus.WAITING_FOR_STREAMING_REQ:
        h.step()
    pinned = held_blocks(h.manager, session)
    assert pinned == 10
    long, behind = h.add(text(29 * 32, 1), max_tokens=4), h.add(text(100, 2), max_tokens=4)
    for _ in range(60):
        h.step()
        h.check()
    assert session in h.live and long not in h.live and behind not in h.live
    assert long not in {eviction.request_id for eviction in h.evictions}
    # With the session gone there is room for both.
    h.abort(session)
    again = h.add(text(29 * 32, 3), max_tokens=4)
    h.run()
    assert again in {eviction.request_id for eviction in h.evictions}
    h.assert_all_returned()


@MODES
def test_a_session_itself_is_left_alone(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=60, keep=0.3, asynchronous=asynchronous)
    session = h.add(text(500, 0), max_tokens=3, resumable=True)
    for _ in range(12):
        h.step()
        h.check()
    assert session in h.live and not h.evictions
    h.abort(session)
    h.run()
    h.assert_all_returned()

"""What a request is told of its eviction reaches it however its answer ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Harness, text

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
REPORT = {"kv_eviction_report": 1}


def outputs_of(h: Harness, request_id: str, steps: int) -> list[Any]:
    """The request's outputs of so many steps."""
    found, update = [], h.scheduler.update_from_output

    def kept(*args: Any) -> Any:
        outputs = update(*args)
        found.extend(o for client in outputs.values() for o in client.outputs if o.request_id == request_id)
        return outputs

    h.scheduler.update_from_output = kept
    for _ in range(steps):
        h.step()
        h.check()
    del h.scheduler.update_from_output
    return found


@MODES
def test_with_stop_strings_every_output_carries_it(tiny_model: Path, asynchronous: bool) -> None:
    """The server finds them, and answers with what came along."""
    h = Harness(tiny_model, num_blocks=100, keep=0.2, asynchronous=asynchronous)
    request_id = h.add(text(300, 0), max_tokens=20, extra_args=REPORT, stop=["never"])
    other = h.add(text(300, 1), max_tokens=20, extra_args=REPORT)
    outputs = outputs_of(h, request_id, 8)
    kept = 2 * 32 + 12
    report = {"policy": "snapkv", "widths": "16", "prompt_tokens": 300, "kept_tokens": kept, "held_tokens": kept}
    report["adopted"] = False
    told = {"kv_eviction": report}
    assert len(outputs) > 4 and all(output.kv_transfer_params == told for output in outputs)
    assert all(output.kv_transfer_params is None for output in outputs_of(h, other, 4))
    h.run()
    h.assert_all_returned()
    assert not h.scheduler._amendments._reporting


@MODES
def test_a_boundary_does_not_hide_what_was_written_to_the_prefix_cache(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=100, keep=0.2, asynchronous=asynchronous, chunk=256, reuse="off")
    prompt, fields = text(700, 0), {"kv_eviction_boundary": 500}
    for created, cached in ((480, 0), (32, 448)):
        request_id = h.add(prompt, max_tokens=4, extra_args=fields)
        (stats,) = [o.prefill_stats for o in outputs_of(h, request_id, 12) if o.prefill_stats is not None]
        assert (stats.num_cached_tokens, stats.num_cache_creation_tokens) == (cached, created)
    h.assert_all_returned()
    assert not h.scheduler._amendments._silent


def test_an_answer_that_ends_while_its_request_is_thrown_out_has_its_report(tiny_model: Path) -> None:
    """The step of its last token was under way, and is processed when it holds nothing any more."""
    h = Harness(tiny_model, num_blocks=100, keep=0.2, asynchronous=True)
    request_id = h.add(text(300, 0), max_tokens=3, extra_args=REPORT)
    request = h.scheduler.requests[request_id]
    while request.num_output_tokens + request.num_output_placeholders < 3:
        h.step()
    told = h.manager.lifecycle.report(request_id)
    assert told is not None and told["policy"] == "snapkv" and request_id in h.live
    h.scheduler._preempt_request(request, 0.0)
    h.scheduler.running.remove(request)
    assert h.manager.lifecycle.lives.get(request_id) is None
    (*_, last) = outputs_of(h, request_id, 2)
    assert last.finished and last.kv_transfer_params == {"kv_eviction": told}
    h.run()
    h.assert_all_returned()

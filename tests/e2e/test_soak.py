"""The short form of `python -m benchmarks.soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import markdown, soak

# Two servers, one after the other. Leaks are looked for in tests/engine and test_memory.py before every change.
pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.e2e, pytest.mark.timeout(900)]


def test_a_storm_leaks_nothing_breaks_nothing_and_changes_no_answer(tmp_path: Path) -> None:
    summary = soak(count=120, rate=400, sample=60, seed=3, folder=tmp_path)
    print(markdown(summary, "soak"))
    assert summary["wrong_answers"] == [] and summary["failed_requests"] == [] and summary["errors_in_the_log"] == []
    assert summary["pool_usage_at_the_end"] == 0
    assert summary["preemptions"] > 0 and summary["evicted_prompts"] > 30
    assert summary["refused_with_400"] > 5
    assert summary["hung_up_amid_the_answer"] > 3  # those who wait for a number of tokens do so on any machine
    assert summary["passed"]

"""Requests that echoes serve, looked at from outside."""

from __future__ import annotations

import pytest

from tests.engine.harness import Harness
from vllm_defensive.engine.life import Phase

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


def preempt(h: Harness, request_id: str) -> None:
    request = h.scheduler.requests[request_id]
    h.scheduler.running.remove(request)
    h.scheduler._preempt_request(request, 0.0)

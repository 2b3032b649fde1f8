"""The status endpoint: what it answers, to whom, and what it leaves to vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_defensive import metrics, status
from vllm_defensive.plan import Eviction


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    status.configure({"policy": "snapkv", "keep": 0.2})
    app = FastAPI()
    app.add_middleware(status.StatusMiddleware)
    yield app
    status.configure({})


def record(request_id: str) -> dict[str, object]:
    eviction = Eviction(request_id, "snapkv", 0.2, 1000, 2, tuple(range(1, 33)), (40, 41, 42, 43, 44), None)
    return status.record_of(eviction, block_size=32)


def test_a_record_counts_whole_blocks_and_the_tail() -> None:
    assert record("a") == {
        "request_id": "a",
        "policy": "snapkv",
        "prompt_tokens": 1000,
        "kept_tokens": (2 + 5) * 32 + 8,
        "freed_blocks": 31 - 2 - 5,
    }


def test_it_states_settings_totals_and_the_last_evictions(app: FastAPI) -> None:
    for i in range(status.SHOWN + 5):
        status.remember(record(f"cmpl-{i}-0-x"))
    answer = TestClient(app).get("/kv_eviction").json()
    assert answer["config"] == {"policy": "snapkv", "keep": 0.2}
    assert set(answer["totals"]) == set(metrics.COUNTERS)
    assert [r["request_id"] for r in answer["last_evictions"]] == [
        f"cmpl-{i}-0-x" for i in range(status.SHOWN + 4, 4, -1)
    ]


@pytest.mark.parametrize("name", ["mine", "cmpl-mine", "cmpl-mine-0-x"])
def test_a_request_is_found_by_any_name_it_has(app: FastAPI, name: str) -> None:
    status.remember(record("cmpl-mine-0-x"))
    status.remember(record("cmpl-mine2-0-x"))
    (found,) = TestClient(app).get(f"/kv_eviction/requests/{name}").json()["evictions"]
    assert found["request_id"] == "cmpl-mine-0-x"
    assert TestClient(app).get("/kv_eviction/requests/min").status_code == 404


def test_it_wants_the_servers_api_key(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    client = TestClient(app)
    for path in ("/kv_eviction", "/kv_eviction/requests/a"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/kv_eviction", headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_without_eviction_there_is_no_such_path(app: FastAPI) -> None:
    status.configure({})
    assert TestClient(app).get("/kv_eviction").status_code == 404

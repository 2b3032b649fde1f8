"""`/kv_eviction/documents` over a stand-in for vLLM's own paths: what is asked of them, and what is made of answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from vllm_defensive.serving import documents, status

REPORT = {"policy": "snapkv", "widths": "16", "prompt_tokens": 6, "kept_tokens": 4, "held_tokens": 3, "adopted": False}


class Server:
    """Keeps what it was asked. report, status: of the answers to completions."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.report: dict[str, Any] = {**REPORT, "pinned": True}
        self.status = 200
        self.app = FastAPI()
        self.app.add_middleware(status.StatusMiddleware)
        self.app.post("/tokenize")(self.tokenize)
        self.app.post("/v1/completions")(self.complete)
        self.client = TestClient(self.app)

    async def note(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.asked.append((request.url.path, body, request.headers.get("authorization")))
        return body

    async def tokenize(self, request: Request) -> dict[str, Any]:
        body = await self.note(request)
        return {"tokens": [ord(c) for c in body.get("prompt", "chat")]}

    async def complete(self, request: Request) -> JSONResponse:
        await self.note(request)
        return JSONResponse({"kv_transfer_params": {"kv_eviction": self.report}}, status_code=self.status)

    def post(self, **body: Any) -> Any:
        return self.client.post("/kv_eviction/documents", json=body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    status.configure({"policy": "snapkv"})
    yield Server()
    status.configure({})


def test_a_text_is_packed_as_a_request_for_one_token(server: Server) -> None:
    answer = server.post(prompt="abcde", policy="adakv", keep=0.1, model="m", pin=60)
    assert answer.status_code == 201
    told = answer.json()
    assert (told["boundary"], told["kept_tokens"], told["held_tokens"], told["was_there"]) == (5, 3, 2, False)
    assert told["pinned_until"] is not None
    (path, asked, _), (_, request, _) = server.asked
    assert path == "/tokenize" and asked == {"prompt": "abcde", "model": "m"}
    assert request == {
        "prompt": [97, 98, 99, 100, 101, 101],
        "max_tokens": 1,
        "model": "m",
        "vllm_xargs": {
            "kv_eviction": "adakv",
            "kv_eviction_keep": 0.1,
            "kv_eviction_boundary": 5,
            "kv_eviction_reuse": "boundary",
            "kv_eviction_report": 1,
            "kv_eviction_pin": 60,
        },
    }
    assert server.client.get("/kv_eviction/documents").json() == {"documents": [told]}
    assert server.client.get(f"/kv_eviction/documents/{told['id']}").json() == told


def test_messages_and_token_ids(server: Server) -> None:
    assert server.post(messages=[{"role": "system", "content": "x"}]).status_code == 201
    assert server.asked[0][1] == {"messages": [{"role": "system", "content": "x"}], "add_generation_prompt": False}
    server.asked.clear()
    assert server.post(prompt=[7, 8, 9]).json()["boundary"] == 3
    assert [path for path, _, _ in server.asked] == ["/v1/completions"]


def test_deleting_lets_go(server: Server) -> None:
    name = server.post(prompt=[7, 8, 9]).json()["id"]
    server.asked.clear()
    assert server.client.delete(f"/kv_eviction/documents/{name}").json()["pinned_until"] is None
    ((_, request, _),) = server.asked
    assert request["vllm_xargs"]["kv_eviction_pin"] == -1 and request["prompt"] == [7, 8, 9, 9]
    assert server.client.get(f"/kv_eviction/documents/{name}").status_code == 404
    assert server.client.delete(f"/kv_eviction/documents/{name}").status_code == 404


def test_what_is_not_pinned_is_let_go_of_without_a_request(server: Server) -> None:
    server.report["pinned"] = False
    told = server.post(prompt=[7, 8, 9]).json()
    assert told["pinned_until"] is None
    server.asked.clear()
    assert server.client.delete(f"/kv_eviction/documents/{told['id']}").status_code == 200 and not server.asked


def test_what_was_not_evicted_is_no_document(server: Server) -> None:
    server.report = {"policy": "none", "prompt_tokens": 6, "kept_tokens": 6, "held_tokens": 6}
    answer = server.post(prompt=[7, 8, 9])
    assert answer.status_code == 409 and "--kv-eviction-min-tokens" in answer.json()["error"]
    assert server.client.get("/kv_eviction/documents").json() == {"documents": []}


def test_the_servers_own_errors_are_handed_on(server: Server) -> None:
    server.status = 400
    answer = server.post(prompt=[7, 8, 9], keep=3)
    assert answer.status_code == 400 and "kv_transfer_params" in answer.json()


@pytest.mark.parametrize(
    "body, says",
    [
        ([], "give an object"),
        ({}, "give either prompt or messages"),
        ({"prompt": "a", "messages": []}, "give either prompt or messages"),
        ({"prompt": 3}, "prompt: give a text"),
        ({"prompt": [1, True]}, "prompt: give a text"),
        ({"prompt": []}, "prompt: it has no tokens"),
        ({"prompt": "a", "pin": "long"}, "pin: give a number"),
        ({"prompt": "a", "size": 3}, "size: unknown, choose from prompt, messages"),
    ],
)
def test_what_is_wrong_is_said(server: Server, body: Any, says: str) -> None:
    answer = server.client.post("/kv_eviction/documents", json=body)
    assert answer.status_code == 400 and answer.json()["error"].startswith(says)
    assert not server.asked


def test_no_json_at_all(server: Server) -> None:
    assert server.client.post("/kv_eviction/documents", content=b"{").status_code == 400


def test_methods(server: Server) -> None:
    answer = server.client.put("/kv_eviction/documents")
    assert answer.status_code == 405 and answer.headers["Allow"] == "GET, POST, HEAD"
    assert server.client.post("/kv_eviction/documents/x").headers["Allow"] == "GET, DELETE, HEAD"


def test_it_is_behind_the_api_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert server.post(prompt=[7, 8, 9]).status_code == 401 and not server.asked
    headers = {"Authorization": "Bearer secret"}
    answer = server.client.post("/kv_eviction/documents", json={"prompt": [7, 8, 9]}, headers=headers)
    assert answer.status_code == 201
    assert server.asked[0][2] == "Bearer secret"


def test_the_last_ones_are_remembered(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_REMEMBERED", 2)
    names = [server.post(prompt=[i]).json()["id"] for i in range(3)]
    listed = server.client.get("/kv_eviction/documents").json()["documents"]
    assert [told["id"] for told in listed] == names[1:]

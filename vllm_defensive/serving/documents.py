"""`/kv_eviction/documents`: pack a document ahead of the questions about it, and pin what was kept.

    POST    {"prompt": text or token ids} or {"messages": [...]}, and, all optional: "pin" (seconds, an hour unless
            given), "policy", "score", "keep", "widths", "model", "cache_salt". Answers what is held of it, and the
            boundary by which requests find it.
    GET     all that were posted to this API server, or one (`/ID`)
    DELETE  /ID: it stays no longer than others

What is posted goes through the server's own `/tokenize` and `/v1/completions`, as a request for one token whose
boundary is the document's end: with the caller's own headers, checks and errors.
"""

from __future__ import annotations

import json
import time
from array import array
from collections import OrderedDict
from typing import Any
from uuid import uuid4

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope

from vllm_defensive.settings.engine import option_name
from vllm_defensive.settings.request import UNPIN

PATH = "/kv_eviction/documents"
_REMEMBERED = 1000
_PIN = 3600
_FIELDS = ("policy", "score", "keep", "widths")
_KNOWN = ("prompt", "messages", "model", "cache_salt", "pin", *_FIELDS)
_NOT_EVICTED = (
    "nothing of it was evicted, and so nothing is there for others: it is too short (--kv-eviction-min-tokens, or a "
    "block of tokens), its ratio keeps all of it, or the cache cannot hold it and its packing at once"
)


class Documents:
    """Those that were posted to this process, the last ones."""

    def __init__(self, app: ASGIApp) -> None:
        """app: what serves all other paths."""
        self._app = app
        self._posted: OrderedDict[str, dict[str, Any]] = OrderedDict()  # what is told of each
        self._requests: dict[str, dict[str, Any]] = {}  # and what was asked of `/v1/completions`

    async def answer(self, scope: Scope, receive: Receive, path: str, body: bytes) -> JSONResponse:
        """The answer to a request with this body. receive: says when its client goes away."""
        name = path.removeprefix(PATH).strip("/")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        allowed = ("GET", "DELETE") if name else ("GET", "POST")
        if method not in allowed:
            allow = ", ".join((*allowed, "HEAD"))
            return JSONResponse({"error": "Method Not Allowed"}, status_code=405, headers={"Allow": allow})
        if method == "POST":
            return await self._post(scope, receive, body)
        if not name:
            return JSONResponse({"documents": list(self._posted.values())})
        if name not in self._posted:
            error = f"document {name!r}: not posted to this API server, or {_REMEMBERED} others since"
            return JSONResponse({"error": error}, status_code=404)
        return JSONResponse(self._posted[name]) if method == "GET" else await self._delete(scope, receive, name)

    async def _post(self, scope: Scope, receive: Receive, body: bytes) -> JSONResponse:
        try:
            asked = json.loads(body)
            _check(asked)
        except ValueError as error:
            return _bad(str(error))
        tokens = asked.get("prompt")
        if not isinstance(tokens, list):
            spoken = {k: asked[k] for k in ("prompt", "messages", "model") if k in asked}
            if "messages" in asked:  # what comes behind is another message
                spoken |= {"add_generation_prompt": False}
            status, answer = await self._call(scope, receive, "/tokenize", spoken)
            if status != 200:
                return JSONResponse(answer, status_code=status)
            tokens = answer["tokens"]
        if not tokens:
            return _bad("prompt: it has no tokens")
        pin = asked.get("pin", _PIN)
        fields = {option_name(name): asked[name] for name in _FIELDS if name in asked}
        fields |= {"kv_eviction_boundary": len(tokens), "kv_eviction_reuse": "boundary", "kv_eviction_report": 1}
        # A token behind the document, so that there is one to be computed whatever is there of it.
        request = {"prompt": [*tokens, tokens[-1]], "max_tokens": 1, "vllm_xargs": {**fields, "kv_eviction_pin": pin}}
        request |= {name: asked[name] for name in ("model", "cache_salt") if name in asked}
        status, answer = await self._call(scope, receive, "/v1/completions", request)
        if status != 200:
            return JSONResponse(answer, status_code=status)
        report = (answer.get("kv_transfer_params") or {}).get("kv_eviction", {})
        if "adopted" not in report:
            return JSONResponse({"error": _NOT_EVICTED}, status_code=409)
        return self._remember(request, len(tokens), pin, report)

    def _remember(self, request: dict[str, Any], tokens: int, pin: float, report: dict[str, Any]) -> JSONResponse:
        name = f"document-{uuid4().hex[:16]}"
        self._posted[name] = told = {
            "id": name,
            "tokens": tokens,
            "boundary": tokens,
            "policy": report["policy"],
            "widths": report["widths"],
            "kept_tokens": report["kept_tokens"] - 1,  # without the token behind it
            "held_tokens": report["held_tokens"] - 1,
            "was_there": report["adopted"],
            "pinned_until": time.time() + pin if report.get("pinned") else None,
        }
        if told["pinned_until"] is not None:  # of the others nothing needs to be asked again
            self._requests[name] = {**request, "prompt": array("I", request["prompt"])}
        while len(self._posted) > _REMEMBERED:
            self._requests.pop(self._posted.popitem(last=False)[0], None)
        return JSONResponse(told, status_code=201)

    async def _delete(self, scope: Scope, receive: Receive, name: str) -> JSONResponse:
        told, request = self._posted[name], self._requests.get(name)
        if request is not None and told["pinned_until"] > time.time():
            fields = {
                **request["vllm_xargs"],
                "kv_eviction_pin": UNPIN,
            }  # the document may be lost: not to be packed anew
            unpin = {**request, "prompt": request["prompt"].tolist(), "vllm_xargs": fields}
            status, answer = await self._call(scope, receive, "/v1/completions", unpin)
            if status != 200:
                return JSONResponse(answer, status_code=status)
        self._posted.pop(name, None)
        self._requests.pop(name, None)
        return JSONResponse({**told, "pinned_until": None})

    async def _call(self, scope: Scope, gone: Receive, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of what another path of this server answers, to the same caller."""
        data, status, parts = json.dumps(body).encode(), 500, list[bytes]()
        keep = [
            (k, v) for k, v in scope["headers"] if k not in (b"content-length", b"content-type", b"transfer-encoding")
        ]
        headers = [*keep, (b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        path = scope.get("root_path", "") + path
        inner = {
            **scope,
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if sent:  # whoever asks on wants to know when the client has gone away
                return await gone()
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._app(inner, receive, send)
        try:
            return status, json.loads(b"".join(parts))
        except ValueError:
            return status, {"error": b"".join(parts).decode(errors="replace")}


def _check(asked: Any) -> None:
    """ValueError for what is no document. Fields of an eviction are checked where those of all requests are."""
    if not isinstance(asked, dict):
        raise ValueError("give an object with a prompt or messages")
    if unknown := sorted(set(asked).difference(_KNOWN)):
        raise ValueError(f"{unknown[0]}: unknown, choose from {', '.join(_KNOWN)}")
    if ("prompt" in asked) == ("messages" in asked):
        raise ValueError("give either prompt or messages")
    prompt = asked.get("prompt", "")
    if isinstance(prompt, list):
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            raise ValueError("prompt: give a text, or a list of token ids")
    elif not isinstance(prompt, str):
        raise ValueError("prompt: give a text, or a list of token ids")
    pin = asked.get("pin", _PIN)
    if isinstance(pin, bool) or not isinstance(pin, (int, float)):
        raise ValueError("pin: give a number of seconds")


def _bad(error: str) -> JSONResponse:
    return JSONResponse({"error": error}, status_code=400)

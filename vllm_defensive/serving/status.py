"""`GET /kv_eviction`: what the server was told to evict, what it has evicted, and the last requests one by one.

An ASGI middleware, added to vLLM's own `--middleware` list when eviction is on. `GET /kv_eviction/requests/{id}`
reports one request, by the id that its response or its `X-Request-Id` header carries. `documents.py` has
`/kv_eviction/documents`. vLLM guards only some paths by the API key, so this one checks it itself.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_defensive import learned
from vllm_defensive.serving import recent
from vllm_defensive.serving.documents import PATH as DOCUMENTS
from vllm_defensive.serving.documents import Documents
from vllm_defensive.serving.prometheus import read_totals, score_is_stale
from vllm_defensive.settings.engine import KEY, NONE

PATH = "/kv_eviction"
SHOWN = 20  # evictions that the status lists
_OF_REQUEST = f"{PATH}/requests/"
_COVERS = (
    "totals: the whole server; last_evictions and requests: those whose statistics reached this API server process, "
    "which is all of them with --api-server-count 1"
)
_UNCOUNTED = "nothing: evictions are not counted with --disable-log-stats"

_config: dict[str, Any] = {}
_learned: dict[str, Any] = {}


def configure(config: dict[str, Any]) -> None:
    """State the settings that this process's engine runs with; forget the evictions of an earlier engine."""
    _config.clear()
    _config.update(config)
    path = config.get("learned", NONE)
    _learned.clear()
    _learned.update({} if path == NONE else learned.summary(learned.load(path), path))
    recent.forget()


def summary() -> dict[str, Any]:
    """The answer to `GET /kv_eviction`. Totals, and whether a learned score is stale, are None where nobody counts."""
    totals = read_totals() if recent.counted() else None
    config = dict(_config) if recent.publishes() else {**_config, "reuse": "off"}
    answer = {"config": config, "totals": totals, "last_evictions": recent.last(SHOWN), "covers": _covers()}
    if _learned:
        answer["learned"] = {**_learned, "stale": score_is_stale() if recent.counted() else None}
    return answer


def _covers() -> str:
    return _COVERS if recent.counted() else _UNCOUNTED


class StatusMiddleware:
    """Answers the paths above and passes every other request on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._documents = Documents(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        documents = path == DOCUMENTS or path.startswith(f"{DOCUMENTS}/")
        ours = documents or path == PATH or path.startswith(_OF_REQUEST)
        if scope["type"] != "http" or not ours or not _config:
            await self.app(scope, receive, send)
            return
        if documents and _authorized(scope):
            answer = await self._documents.answer(scope, receive, path, await Request(scope, receive).body())
        else:
            answer = self._answer(scope, path)
        await answer(scope, receive, send)

    def _answer(self, scope: Scope, path: str) -> JSONResponse:
        if not _authorized(scope):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        if scope["method"] not in ("GET", "HEAD"):
            return JSONResponse({"error": "Method Not Allowed"}, status_code=405, headers={"Allow": "GET, HEAD"})
        if path == PATH:
            return JSONResponse(summary())
        request_id = path.removeprefix(_OF_REQUEST)
        found = recent.find(request_id)
        if request_id and found:
            return JSONResponse({"evictions": found})
        return JSONResponse(
            {
                "error": f"{KEY} request {request_id!r}: not evicted, not yet reported, or too long ago",
                "covers": _covers(),
            },
            status_code=404,
        )


def _authorized(scope: Scope) -> bool:
    """Whether the request carries the server's API key, or the server has none. vLLM's own rule, and its own check."""
    args = getattr(scope["app"].state, "args", None)
    tokens = [key for key in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]
    if not tokens:
        return True
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    return bool(AuthenticationMiddleware(scope["app"], tokens).verify_token(Headers(scope=scope)))

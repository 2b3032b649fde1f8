"""The status endpoint: what it answers, to whom, and what it leaves to vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.evictions import eviction
from vllm_defensive.counts import record_of
from vllm_defensive.plugin import register
from vllm_defensive.serving import prometheus as metrics
from vllm_defensive.serving import recent, status
from vllm_defensive.settings import engine as config

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # until 0.32 is dropped
    from vllm.entrypoints.launchers.cli_args import make_arg_parser


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    status.configure({"policy": "snapkv", "keep": 0.2})
    recent.count()
    app = FastAPI()
    app.add_middleware(status.StatusMiddleware)
    yield app
    status.configure({})


def record(request_id: str) -> dict[str, object]:
    return record_of(eviction(1000, (40, 41, 42, 43, 44), shared_blocks=2, block_tokens=32, request_id=request_id))


def test_a_record_counts_whole_blocks_and_the_tail() -> None:
    assert record("a") == {
        "request_id": "a",
        "policy": "snapkv",
        "prompt_tokens": 1000,
        "widths": "16",
        "kept_tokens": (2 + 5) * 32 + 8,
        "held_tokens": (2 + 5) * 32 + 8,
        "freed_blocks": 31 - 2 - 5,
        "adopted": False,
        "repeat": 0,
    }


def test_it_states_settings_totals_and_the_last_evictions(app: FastAPI) -> None:
    for i in range(status.SHOWN + 5):
        recent.remember(record(f"cmpl-{i}-0-0123abcd"))
    answer = TestClient(app).get("/kv_eviction").json()
    assert answer["config"] == {"policy": "snapkv", "keep": 0.2}
    assert set(answer["totals"]) == set(metrics.COUNTERS)
    assert [r["request_id"] for r in answer["last_evictions"]] == [
        f"cmpl-{i}-0-0123abcd" for i in range(status.SHOWN + 4, 4, -1)
    ]


@pytest.mark.parametrize("name", ["mine", "cmpl-mine", "cmpl-mine-0-0123abcd"])
def test_a_request_is_found_by_any_name_it_has(app: FastAPI, name: str) -> None:
    recent.remember(record("cmpl-mine-0-0123abcd"))
    recent.remember(record("cmpl-mine2-0-0123abcd"))
    (found,) = TestClient(app).get(f"/kv_eviction/requests/{name}").json()["evictions"]
    assert found["request_id"] == "cmpl-mine-0-0123abcd"
    assert TestClient(app).get("/kv_eviction/requests/min").status_code == 404


# As vLLM's servers were seen to name them, and the two names by which a client knows them.
NAMES = [
    ("cmpl-job-1-0-a1c2b39a", {"job-1", "cmpl-job-1"}),
    ("cmpl-job-1-2-10-12345678", {"job-1-2", "cmpl-job-1-2"}),
    ("cmpl-job-1-0", {"job-1", "cmpl-job-1"}),  # VLLM_DISABLE_REQUEST_ID_RANDOMIZATION
    ("1_cmpl-job-1-0-a1c2b39a", {"job-1", "cmpl-job-1"}),
    ("cmpl-job-937b163925a6f2bf-beam-3-bc26bfe8", {"job", "cmpl-job"}),
    ("chatcmpl-job-1-926a354d", {"job-1", "chatcmpl-job-1"}),
    ("1_chatcmpl-job-1-926a354d", {"job-1", "chatcmpl-job-1"}),
    ("chatcmpl-job_1-926a354d", {"job", "chatcmpl-job", "job_1", "chatcmpl-job_1"}),
    ("generate-tokens-job-1-926a354d", {"job-1", "generate-tokens-job-1"}),
    ("generative-scoring-job-1-0-926a354d", {"job-1", "generative-scoring-job-1"}),
    ("decision-job-1-0-926a354d", {"job-1", "decision-job-1"}),
    ("resp_902d1e19aa6f08a9_0-89b6da52", {"resp_902d1e19aa6f08a9"}),
]


@pytest.mark.parametrize("internal, names", NAMES, ids=[internal for internal, _ in NAMES])
def test_an_internal_id_answers_to_its_own_names_only(internal: str, names: set[str]) -> None:
    assert names <= recent.names_of(internal)
    others = {"job", "job-1", "job-1-2", "job_1", "cmpl-job", "cmpl-job-1", "chatcmpl-job", "chatcmpl-job-1"} - names
    assert not others & recent.names_of(internal)


def test_a_server_that_counts_nothing_says_so(app: FastAPI) -> None:
    status.configure({"policy": "snapkv"})
    answer = TestClient(app).get("/kv_eviction").json()
    assert answer["config"] == {"policy": "snapkv"} and answer["totals"] is None
    assert "--disable-log-stats" in answer["covers"]
    assert "--disable-log-stats" in TestClient(app).get("/kv_eviction/requests/a").json()["covers"]


class Guard:
    """A middleware of the user's own, which lets nobody in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        served = self.app if scope["type"] != "http" else Response(status_code=418)
        await served(scope, receive, send)


def test_the_users_own_middleware_guards_it() -> None:
    """In vLLM's own set-up of a server: `--middleware` given before our flags."""
    register()
    parser = make_arg_parser(FlexibleArgumentParser())
    for guards, status_code in ((), 200), (("--middleware", f"{__name__}.Guard"), 418):
        arguments = parser.parse_args([*guards, "--kv-eviction", "snapkv"])
        app = FastAPI()
        init_entrypoints_middleware(arguments, app, ("generate",))
        status.configure(arguments.additional_config["kv_eviction"])
        assert TestClient(app).get("/kv_eviction").status_code == status_code
    status.configure({})


def test_an_engine_is_known_before_it_counts_anything(tiny_model: Path) -> None:
    """With --disable-log-stats nothing ever will be."""
    register()
    settings = {"kv_eviction": {"policy": "snapkv", "keep": 0.3}}
    AsyncEngineArgs(model=str(tiny_model), disable_log_stats=True, additional_config=settings).create_engine_config()
    expected = {**config.parse(settings["kv_eviction"]).as_json(), "reuse": "boundary"}
    assert status.summary()["config"] == {**expected, "auto_widths": True}, "as CPUs with a compiler have it"
    status.configure({})


def test_it_states_that_what_is_kept_cannot_outlive_its_request(tiny_model: Path) -> None:
    """Without vLLM's prefix cache from the start, and once an engine has said that its layers do not allow it."""
    register()
    settings = {"kv_eviction": {"policy": "snapkv"}}
    args = {"model": str(tiny_model), "additional_config": settings}
    made = AsyncEngineArgs(**args, enable_prefix_caching=False).create_engine_config()
    assert status.summary()["config"]["reuse"] == made.additional_config["kv_eviction"]["reuse"] == "off"
    made = AsyncEngineArgs(**args, enable_prefix_caching=True).create_engine_config()
    assert status.summary()["config"]["reuse"] == made.additional_config["kv_eviction"]["reuse"] == "boundary"
    assert settings == {"kv_eviction": {"policy": "snapkv"}}
    recent.note_publishing(False)
    assert status.summary()["config"]["reuse"] == "off"
    settings["kv_eviction"]["reuse"] = "boundary"
    with pytest.raises(ValueError, match=r"enable_prefix_caching=False: .*drop --kv-eviction-reuse"):
        AsyncEngineArgs(**args, enable_prefix_caching=False).create_engine_config()
    status.configure({})


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

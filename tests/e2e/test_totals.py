"""Two API servers in front of two engines: what they say of evictions, whichever answers, is what clients were told."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from benchmarks.server import Server
from tests.dashboard import missing, targets
from vllm_defensive.counts import Totals

# Six processes import vLLM: about a minute of two free cores, and more of busy ones.
pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.e2e, pytest.mark.timeout(600)]

KEY = "sesame"
FLAGS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    "--api-server-count", "2", "--data-parallel-size", "2", "--api-key", KEY, "--enable-scale-out",
    "--kv-eviction", "layer-defensivekv", "--kv-eviction-keep", "0.25", "--kv-eviction-min-tokens", "100",
)  # fmt: skip
N = 32  # tokens a block
PROMPT = [2 + 11 * i % 500 for i in range(700)]
STORY = "a lighthouse and its keeper " * 30
CHAT = [{"role": "user", "content": STORY}]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tiny_model, FLAGS, tmp_path_factory.mktemp("totals") / "log", seconds=550) as server:
        yield server


def ask(server: Server, path: str, key: str | None = KEY, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a GET, on a connection of its own: whichever API server is awake first takes it."""
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers), timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask_each(server: Server, path: str) -> list[tuple[int, Any]]:
    """Status and JSON of a GET from each API server: both wait at one socket, so the other is held still meanwhile."""
    api_servers = [
        p for p in psutil.Process(server.pid).children(recursive=True) if "APIServer" in " ".join(p.cmdline())
    ]
    assert len(api_servers) == 2
    answers = []
    for other in api_servers:
        other.suspend()
        try:
            answers.append(ask(server, path))
        finally:
            other.resume()
    return answers


def post(server: Server, path: str, request_id: str | None = None, **fields: Any) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    if request_id is not None:
        headers["X-Request-Id"] = request_id
    request = urllib.request.Request(server.url + path, json.dumps({"model": "tiny", **fields}).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def samples(server: Server) -> list[Sample]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def totals_by_engine(server: Server) -> dict[str, dict[str, float]]:
    """Engine -> total -> value, of `/metrics`."""
    found: dict[str, dict[str, float]] = {}
    for sample in samples(server):
        name = sample.name.removeprefix("vllm:kv_eviction_").removesuffix("_total")
        if name in ("requests", "prompt_tokens", "kept_tokens", "held_tokens", "freed_blocks"):
            found.setdefault(sample.labels["engine"], {})[name] = sample.value
    return found


def test_totals_are_what_the_clients_were_told(server: Server) -> None:
    rng = random.Random(7)
    lengths = [rng.randint(200, 1500) for _ in range(24)] + [rng.randint(40, 90) for _ in range(6)]
    prompts = [[rng.randint(2, 500) for _ in range(length)] for length in lengths]

    def report(prompt: list[int]) -> dict[str, Any]:
        fields = {"max_tokens": 4, "temperature": 0, "vllm_xargs": {"kv_eviction_report": 1}}
        return post(server, "/v1/completions", prompt=prompt, **fields)["kv_transfer_params"]["kv_eviction"]

    with ThreadPoolExecutor(8) as clients:
        reports = list(clients.map(report, prompts))
    assert [r["prompt_tokens"] for r in reports] == lengths
    evicted = [r for r in reports if r["kept_tokens"] < r["prompt_tokens"]]
    assert len(evicted) == 24, "those below --kv-eviction-min-tokens are left alone"
    prompt, kept = (sum(r[name] for r in evicted) for name in ("prompt_tokens", "kept_tokens"))
    told = {"requests": 24, "prompt_tokens": prompt, "kept_tokens": kept, "freed_blocks": (prompt - kept) // N}
    told["held_tokens"] = sum(r["held_tokens"] for r in evicted)

    deadline = time.monotonic() + 20  # the other API server may not have handled its share of the statistics yet
    while True:
        engines = totals_by_engine(server)
        found = {name: sum(totals[name] for totals in engines.values()) for name in told}
        if found == told or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert found == told
    assert set(engines) == {"0", "1"} and all(totals["requests"] > 0 for totals in engines.values())

    heard = set()  # the lists of last evictions, of which each API server has its own
    for status, answer in ask_each(server, "/kv_eviction"):
        assert status == 200
        assert answer["totals"] == {**asdict(Totals()), **told}
        heard.add(json.dumps(answer["last_evictions"]))
    assert len(heard) == 2, "both API servers answered"


@pytest.mark.parametrize("path", ["/kv_eviction", "/kv_eviction/requests/x"])
def test_it_wants_the_api_key(server: Server, path: str) -> None:
    assert ask(server, path, key=None)[0] == ask(server, path, key="wrong")[0] == 401
    assert ask(server, path)[0] == (200 if path == "/kv_eviction" else 404)
    assert ask(server, "/kv_eviction")[1]["config"]["policy"] == "layer-defensivekv"


def found_by_id(server: Server, name: str) -> list[str]:
    """Internal ids of the evictions of one request, of whichever API server knows them; [] if none does."""
    found = []
    for status, answer in ask_each(server, f"/kv_eviction/requests/{name}"):
        assert status in (200, 404)
        if status == 200:
            assert all(e["kept_tokens"] < e["prompt_tokens"] for e in answer["evictions"])
            found += [e["request_id"] for e in answer["evictions"]]
    return sorted(found)


@pytest.mark.parametrize(
    "path, fields, evictions",
    [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}, 1),
        ("/v1/completions", {"prompt": [PROMPT, PROMPT], "max_tokens": 2}, 2),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "n": 2}, 2),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "n": 2}, 2),
        ("/v1/chat/completions/batch", {"messages": [CHAT, CHAT], "max_tokens": 2}, 2),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 2}, 1),
        ("/v1/responses", {"input": STORY, "max_output_tokens": 2}, 1),
        ("/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": {"max_tokens": 2}}, 1),
    ],
    ids=["completion", "two-prompts", "two-answers", "chat", "batch", "messages", "responses", "tokens"],
)
def test_a_request_is_found_by_the_id_of_its_response(
    server: Server, path: str, fields: dict[str, Any], evictions: int, request: pytest.FixtureRequest
) -> None:
    mine = request.node.callspec.id
    answer = post(server, path, mine, **fields)
    found = found_by_id(server, answer.get("id") or answer["request_id"])
    assert len(found) == evictions
    if path != "/v1/responses":  # which makes ids of its own
        assert found_by_id(server, mine) == found


def test_an_id_that_begins_like_another_is_another(server: Server) -> None:
    post(server, "/v1/completions", "job-1-2", prompt=PROMPT, max_tokens=2)
    assert len(found_by_id(server, "job-1-2")) == 1
    assert found_by_id(server, "job-1") == []
    post(server, "/v1/completions", "job-1", prompt=PROMPT, max_tokens=2, n=2)
    assert len(found_by_id(server, "job-1")) == 2


def test_every_query_of_the_dashboard_finds_its_series(server: Server) -> None:
    """After an eviction; vLLM's own metrics included."""
    post(server, "/v1/completions", prompt=PROMPT, max_tokens=2)
    there = samples(server)
    assert {target["expr"]: missing(target, there) for target in targets()} == {t["expr"]: [] for t in targets()}

"""What goes wrong outside stays outside: a client that leaves, and an engine process that is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

POOL_BLOCKS = 200
COMMON = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096",
    "--block-size", "32", "--num-gpu-blocks-override", str(POOL_BLOCKS),
)  # fmt: skip
EVICTION = ("--kv-eviction", "layer-defensivekv", "--kv-eviction-keep", "0.25", "--kv-eviction-min-tokens", "100")


def request(num_tokens: int, max_tokens: int, **more: Any) -> dict[str, Any]:
    prompt = [2 + 7 * i % 500 for i in range(num_tokens)]
    return {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


def held_blocks(server: Server) -> int:
    return round(server.metric("vllm:kv_cache_usage_perc") * (POOL_BLOCKS - 1))


def wait_for(condition: Any, seconds: float = 60) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def servers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Stock vLLM and vLLM with eviction. Both are killed by the last test."""
    folder = tmp_path_factory.mktemp("faults")
    with (
        Server(tiny_model, COMMON, folder / "stock.log") as stock,
        Server(tiny_model, [*COMMON, *EVICTION], folder / "eviction.log") as eviction,
    ):
        yield {"stock": stock, "eviction": eviction}


@pytest.mark.parametrize("moment", ["before the first token", "amid the answer"])
def test_a_client_that_disconnects_frees_its_blocks(servers: dict[str, Server], moment: str) -> None:
    server = servers["eviction"]
    evicted = server.metric("vllm:kv_eviction_requests_total")
    body = request(3000, 1000, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as reply:
        if moment == "amid the answer":
            lines = (line for line in reply.iter_lines() if line.startswith("data: "))
            for _ in range(20):
                assert json.loads(next(lines).removeprefix("data: "))["choices"]
            assert wait_for(lambda: server.metric("vllm:kv_eviction_requests_total") == evicted + 1, 20)
            assert 0 < held_blocks(server) <= 3000 // 32 // 2, "it is evicted, and holds what was kept"
    assert wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 20)
    # The gauges are of the engine's last report; one more request makes them fresh.
    assert httpx.post(f"{server.url}/v1/completions", json=request(5, 1), timeout=60).status_code == 200
    assert wait_for(lambda: held_blocks(server) == 0, 20)


def kill_the_engine(server: Server) -> dict[str, Any]:
    """Kill the engine's process while clients wait. Returns what each sees, and how the server ends.

    An answer of HTTP 500 races the end of the connection: either is an error for the client, and is called so.
    """
    parent = server._process
    assert parent is not None
    seen: dict[str, Any] = {}

    def ask(name: str, stream: bool) -> None:
        try:
            reply = httpx.post(f"{server.url}/v1/completions", json=request(3000, 1000, stream=stream), timeout=60)
            events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
            failed = any('"error"' in event for event in events) if stream else reply.status_code >= 500
            seen[name] = "error" if failed else f"an answer: {reply.status_code} {reply.text[-300:]}"
        except httpx.TransportError:
            seen[name] = "error"
        except Exception as error:  # or the thread would end in silence
            seen[name] = repr(error)

    clients = [threading.Thread(target=ask, args=(f"stream={s}", s)) for s in (False, True)]
    for client in clients:
        client.start()
    assert wait_for(lambda: server.metric("vllm:num_requests_running") == 2, 60)
    (engine,) = [p for p in psutil.Process(parent.pid).children() if "EngineCore" in " ".join(p.cmdline())]
    os.kill(engine.pid, signal.SIGKILL)
    for client in clients:
        client.join(timeout=60)
        assert not client.is_alive(), "a client hangs"
    seen["exit code"] = parent.wait(timeout=60)
    return seen


def test_a_killed_engine_ends_as_with_stock_vllm(servers: dict[str, Server]) -> None:
    seen = {name: kill_the_engine(server) for name, server in servers.items()}
    print(seen)
    assert seen["eviction"] == seen["stock"]
    assert seen["stock"]["stream=False"] == seen["stock"]["stream=True"] == "error"

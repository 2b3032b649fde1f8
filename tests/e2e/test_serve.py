"""`vllm serve` with the flags: it answers, counts and writes what it kept."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import random_prompts
from tests.processes import ROOT, environment
from vllm_defensive import audit

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FLAGS = ("--kv-eviction", "layer-defensivekv", "--kv-eviction-keep", "0.25", "--kv-eviction-min-tokens", "100")


def vllm(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(tiny_model: Path, folder: Path) -> Iterator[str]:
    """Address of a server on the tiny model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "log").open("w")
    command = vllm("serve", str(tiny_model), "--port", str(port), "--host", "127.0.0.1", "--dtype", "bfloat16")
    command += [
        "--enforce-eager",
        "--max-model-len",
        "2048",
        *FLAGS,
        "--kv-eviction-audit",
        str(folder / "audit"),
    ]
    process = subprocess.Popen(
        command, env=environment(VLLM_LOGGING_LEVEL="INFO"), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while not answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        log.close()


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except (urllib.error.URLError, OSError):
        return False


def post(server: str, tiny_model: Path, **fields: Any) -> dict[str, Any]:
    body = {"model": str(tiny_model), "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def counter(server: str, name: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def pages_by_decile(server: str) -> dict[str, float]:
    name = "vllm:kv_eviction_kept_pages_total{"
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith(name)]
    return {line.partition('layer_decile="')[2][0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_completion_is_evicted_counted_and_audited(server: str, tiny_model: Path, folder: Path) -> None:
    prompts = random_prompts((700, 40))
    before = counter(server, "vllm:kv_eviction_requests_total")
    pages_before = pages_by_decile(server)
    for prompt in prompts:
        reply = post(server, tiny_model, prompt=prompt)
        assert reply["usage"]["completion_tokens"] == 8
    deadline = time.monotonic() + 20  # counters follow the engine's outputs
    while counter(server, "vllm:kv_eviction_requests_total") == before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert counter(server, "vllm:kv_eviction_requests_total") == before + 1
    assert counter(server, "vllm:kv_eviction_prompt_tokens_total") >= 700
    assert (
        0
        < counter(server, "vllm:kv_eviction_kept_tokens_total")
        < counter(server, "vllm:kv_eviction_prompt_tokens_total")
    )
    assert counter(server, "vllm:kv_eviction_freed_blocks_total") > 0
    assert counter(server, "vllm:kv_eviction_seconds_sum") > 0
    kept = [audit.load(path) for path in (folder / "audit").iterdir()]
    (found,) = (a for a in kept if a.token_ids.tolist() == prompts[0])
    assert (found.policy, found.keep_ratio, found.block_size) == ("layer-defensivekv", 0.25, 32)
    in_pages_L = found.kept_counts.sum(dim=1) - 2 * (32 * found.shared_blocks + 700 % 32)  # of 2 heads
    grown = {decile: pages - pages_before[decile] for decile, pages in pages_by_decile(server).items()}
    assert grown == {**dict.fromkeys(grown, 0), **dict(zip("036", (in_pages_L / 32).tolist(), strict=True))}


def test_wrong_request_fields_are_answered_with_400(server: str, tiny_model: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, tiny_model, prompt=[5] * 200, vllm_xargs={"kv_eviction_keep": 7})
    assert error.value.code == 400
    assert "kv_eviction_keep=7" in error.value.read().decode()
    assert answers(f"{server}/health"), "and the engine lives on"


def test_the_start_up_line_states_policy_ratio_and_pages(server: str, folder: Path) -> None:
    (line,) = (x for x in (folder / "log").read_text().splitlines() if "KV eviction is on" in x)
    assert "layer-defensivekv" in line and "0.25" in line
    assert (
        "in widths 16, reuse boundary; pages of 32 tokens" in line and "3 layers x 2 KV heads, 6 pages a block" in line
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        pytest.param(
            ["--kv-eviction", "snapkb"],
            "--kv-eviction=snapkb: choose one of none, auto, random, streamingllm",
            marks=pytest.mark.nightly,
        ),
        (["--kv-eviction", "snapkv", "--pipeline-parallel-size", "2"], "pipeline_parallel_size=2: not supported"),
    ],
)
def test_what_does_not_work_ends_with_exit_code_2_and_one_line(
    tiny_model: Path, flags: list[str], message: str
) -> None:
    done = subprocess.run(
        vllm("serve", str(tiny_model), *flags),
        env=environment(VLLM_LOGGING_LEVEL="ERROR"),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in done.stderr


def send(server: str, path: str, **body: Any) -> dict[str, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def test_a_document_is_posted_asked_about_and_let_go(server: str) -> None:
    (document,) = random_prompts([700], seed=77)
    told = send(server, "/kv_eviction/documents", prompt=document, pin=60)
    assert told["boundary"] == 700 and told["policy"] == "layer-defensivekv" and not told["was_there"]
    assert told["held_tokens"] < 300 and told["pinned_until"] is not None
    fields = {"kv_eviction_boundary": 700, "kv_eviction_report": 1}
    for seed in (78, 79):
        (question,) = random_prompts([30], seed=seed)
        answer = send(server, "/v1/completions", prompt=document + question, max_tokens=4, vllm_xargs=fields)
        assert answer["kv_transfer_params"]["kv_eviction"]["adopted"]
    (listed,) = json.loads(urllib.request.urlopen(f"{server}/kv_eviction/documents").read())["documents"]
    assert listed == told
    request = urllib.request.Request(f"{server}/kv_eviction/documents/{told['id']}", method="DELETE")
    before = counter(server, "vllm:prompt_tokens_total"), counter(server, "vllm:kv_eviction_adoptions_total")
    assert json.loads(urllib.request.urlopen(request).read())["pinned_until"] is None
    after = counter(server, "vllm:prompt_tokens_total"), counter(server, "vllm:kv_eviction_adoptions_total")
    assert after == before, "nothing was computed for it"
    assert counter(server, "vllm:kv_eviction_pinned_blocks") == 0
    assert not json.loads(urllib.request.urlopen(f"{server}/kv_eviction/documents").read())["documents"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        send(server, "/kv_eviction/documents", prompt=document, keep=3)
    assert refused.value.code == 400 and "kv_eviction_keep" in refused.value.read().decode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        send(server, "/kv_eviction/documents", prompt=document[:50])
    assert refused.value.code == 409

"""`vllm run-batch`: a file of requests, each with fields of its own, answered without a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FLAGS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    "--block-size", "32", "--kv-eviction", "snapkv", "--kv-eviction-keep", "0.5", "--kv-eviction-min-tokens", "100",
    "--kv-eviction-shared", "evict",  # all lines ask about one text, which would be left whole for them to share
)  # fmt: skip
MESSAGES = [{"role": "user", "content": "a lighthouse and its keeper " * 30}]
REQUESTS: dict[str, dict[str, Any]] = {
    "as started": {},
    "a policy": {"kv_eviction": "layer-defensivekv", "kv_eviction_keep": 0.25},
    "none": {"kv_eviction": "none"},
    "a boundary": {"kv_eviction_keep": 0.25, "kv_eviction_boundary": 200},
    "a wrong ratio": {"kv_eviction_keep": 7},
    "a wrong boundary": {"kv_eviction_boundary": 10**6},
    "an unknown field": {"kv_eviction_ratio": 0.2},
}


@pytest.fixture(scope="module")
def answers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The line of each request in the output, by its name."""
    folder = tmp_path_factory.mktemp("batch")
    shape = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with (folder / "in.jsonl").open("w") as file:
        for name, fields in REQUESTS.items():
            body = {**shape, "vllm_xargs": {"kv_eviction_report": 1, **fields}}
            print(json.dumps(line(name, body)), file=file)
        print(json.dumps(line("no report", {**shape, "vllm_xargs": {"kv_eviction": "snapkv"}})), file=file)
        beams = {"use_beam_search": True, "n": 2, "vllm_xargs": {"kv_eviction_keep": 0.5}}
        print(json.dumps(line("beams", {**shape, **beams})), file=file)
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", "--model", str(tiny_model), *FLAGS,
        "-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    return {answer["custom_id"]: answer for answer in lines}


def line(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_each_request_is_answered_with_its_own_eviction(answers: dict[str, dict[str, Any]]) -> None:
    prompt = answers["none"]["response"]["body"]["usage"]["prompt_tokens"]
    tail, blocks = prompt % 32, prompt // 32
    # The last, partial block counts as kept, and a ratio is rounded up to the next block.
    half, quarter = (int(-(-(ratio * prompt - tail) // 32)) * 32 + tail for ratio in (0.5, 0.25))
    assert blocks > 12 and quarter < half < prompt
    expected = {
        "as started": ("snapkv", half),
        "a policy": ("layer-defensivekv", quarter),
        "none": ("none", prompt),
        "a boundary": ("snapkv", prompt - 192 + 2 * 32),
    }
    for name, (policy, kept) in expected.items():
        response = answers[name]["response"]
        assert answers[name]["error"] is None and response["status_code"] == 200
        assert response["body"]["usage"]["completion_tokens"] == 8
        report = response["body"]["kv_transfer_params"]["kv_eviction"]
        widths = {} if policy == "none" else {"widths": "16", "adopted": False}
        tokens = {"prompt_tokens": prompt, "kept_tokens": kept, "held_tokens": kept}
        assert report == {"policy": policy, **widths, **tokens}, name
    assert answers["no report"]["response"]["status_code"] == 200
    assert answers["no report"]["response"]["body"]["kv_transfer_params"] is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("a wrong ratio", "kv_eviction_keep=7: choose a number in (0, 1]"),
        ("a wrong boundary", "kv_eviction_boundary=1000000: the prompt has"),
        ("an unknown field", "kv_eviction_ratio=0.2: unknown, choose from kv_eviction,"),
        ("beams", "has no effect with use_beam_search"),
    ],
)
def test_a_wrong_field_is_an_entry_with_status_400(answers: dict[str, dict[str, Any]], name: str, message: str) -> None:
    answer = answers[name]
    assert answer["response"]["status_code"] == 400 and answer["response"]["body"] is None
    assert message in answer["error"]["error"]["message"]

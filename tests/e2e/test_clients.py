"""Clients that know nothing of eviction: the `openai` package and `vllm bench serve`, unmodified."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.server import Server
from tests.processes import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FLAGS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    "--kv-eviction", "none", "--kv-eviction-per-request", "--kv-eviction-min-tokens", "100",
)  # fmt: skip
OURS: dict[str, Any] = {"vllm_xargs": {"kv_eviction": "layer-defensivekv", "kv_eviction_keep": 0.25}}
PROMPT = [2 + 11 * i % 500 for i in range(700)]
MESSAGES: Any = [{"role": "user", "content": "a lighthouse and its keeper " * 30}]
LENGTH: dict[str, Any] = {"model": "tiny", "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tiny_model, FLAGS, tmp_path_factory.mktemp("clients") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def evicted(server: Server) -> float:
    return server.metric("vllm:kv_eviction_requests_total")


def test_the_openai_client_asks_with_and_without_our_fields(server: Server, client: openai.OpenAI) -> None:
    before = evicted(server)
    plain = client.completions.create(prompt=PROMPT, **LENGTH, extra_body={"ignore_eos": True})
    assert evicted(server) == before
    ours = client.completions.create(prompt=PROMPT, **LENGTH, extra_body={"ignore_eos": True, **OURS})
    assert evicted(server) == before + 1
    assert plain.usage and ours.usage and plain.usage.completion_tokens == ours.usage.completion_tokens == 16
    assert ours.usage.prompt_tokens == len(PROMPT)
    chat = client.chat.completions.create(messages=MESSAGES, **LENGTH, extra_body=OURS)
    assert chat.choices[0].message.content
    assert evicted(server) == before + 2


def test_the_openai_client_streams_the_same_answer(server: Server, client: openai.OpenAI) -> None:
    before = evicted(server)
    whole = client.chat.completions.create(messages=MESSAGES, **LENGTH, extra_body=OURS)
    stream = client.chat.completions.create(messages=MESSAGES, stream=True, **LENGTH, extra_body=OURS)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 2 and "".join(parts) == whole.choices[0].message.content
    assert evicted(server) == before + 2


def test_the_asynchronous_openai_client_asks_at_once(server: Server) -> None:
    before = evicted(server)

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            prompts = [[*PROMPT, 2 + i] for i in range(4)]
            return await asyncio.gather(
                *(client.completions.create(prompt=p, **LENGTH, extra_body=OURS) for p in prompts)
            )

    assert all(answer.usage.prompt_tokens == len(PROMPT) + 1 for answer in asyncio.run(ask_all()))
    assert evicted(server) == before + 4


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ["completions", "chat", "responses"])
@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("kv_eviction_keep", 1.5, r"=1\.5: choose a number in \(0, 1\]"),
        ("kv_eviction_boundary", 10**6, r"=1000000: the prompt has \d+ tokens"),
        ("kv_eviction_boundary", True, "=True: choose a whole number of prompt tokens, 1 or more"),
    ],
)
def test_a_wrong_field_is_a_bad_request_before_any_answer_begins(
    server: Server, client: openai.OpenAI, route: str, stream: bool, field: str, value: Any, allowed: str
) -> None:
    extra = {"vllm_xargs": {"kv_eviction": "snapkv", field: value}}
    before = server.metric("vllm:prompt_tokens_total")
    with pytest.raises(openai.BadRequestError, match=field + allowed) as error:
        if route == "completions":
            client.completions.create(prompt=[PROMPT, PROMPT], stream=stream, **LENGTH, extra_body=extra)
        elif route == "chat":
            client.chat.completions.create(messages=MESSAGES, stream=stream, **LENGTH, extra_body=extra)
        else:
            client.responses.create(model="tiny", input="a lighthouse", stream=stream, extra_body=extra)
    assert error.value.status_code == 400 and error.value.param == field
    assert server.metric("vllm:prompt_tokens_total") == before, "the engine has not seen it"


@pytest.mark.parametrize("route", ["completions", "chat", "responses"])
def test_a_response_reports_what_was_kept_if_asked(server: Server, client: openai.OpenAI, route: str) -> None:
    def ask(**fields: Any) -> dict[str, Any] | None:
        body = {"vllm_xargs": {**OURS["vllm_xargs"], **fields}}
        if route == "completions":
            return client.completions.create(prompt=PROMPT, **LENGTH, extra_body=body).kv_transfer_params
        if route == "chat":
            return client.chat.completions.create(messages=MESSAGES, **LENGTH, extra_body=body).kv_transfer_params
        story = MESSAGES[0]["content"]
        return client.responses.create(
            model="tiny", input=story, max_output_tokens=16, extra_body=body
        ).kv_transfer_params

    names = [f"vllm:kv_eviction_{name}_tokens_total" for name in ("prompt", "kept")]
    before = [server.metric(name) for name in names]
    report = ask(kv_eviction_report=1)
    prompt, kept = (server.metric(name) - start for name, start in zip(names, before, strict=True))
    assert 0 < kept < prompt
    told = {"policy": "layer-defensivekv", "widths": "16", "adopted": False}
    assert report == {"kv_eviction": {**told, "prompt_tokens": prompt, "kept_tokens": kept, "held_tokens": kept}}
    half = ask(kv_eviction_report=True, kv_eviction_boundary=200)["kv_eviction"]
    assert half["prompt_tokens"] == prompt and half["kept_tokens"] == prompt - 192 + 2 * 32
    whole = ask(kv_eviction_report=1, kv_eviction="none")["kv_eviction"]
    assert whole == {"policy": "none", **dict.fromkeys(("prompt_tokens", "kept_tokens", "held_tokens"), prompt)}
    assert ask() is None


@pytest.mark.parametrize("extra", [pytest.param(None, marks=pytest.mark.nightly), OURS], ids=["plain", "extra-body"])
def test_vllm_bench_serve(server: Server, tiny_model: Path, tmp_path: Path, extra: dict[str, Any] | None) -> None:
    before = evicted(server)
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", server.url,
        "--model", "tiny", "--tokenizer", str(tiny_model), "--dataset-name", "random", "--random-input-len", "400",
        "--random-output-len", "8", "--num-prompts", "6", "--ignore-eos", "--save-result",
        "--result-dir", str(tmp_path), "--result-filename", "result.json",
        *([] if extra is None else ["--extra-body", json.dumps(extra)]),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 6 and result["total_output_tokens"] == 6 * 8
    assert evicted(server) - before == (0 if extra is None else 6)

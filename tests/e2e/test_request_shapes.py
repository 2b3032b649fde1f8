"""The shapes of requests that servers take: several prompts and answers, streams, scores of the prompt, other APIs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FLAGS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    "--kv-eviction", "none", "--kv-eviction-per-request", "--kv-eviction-min-tokens", "100",
    "--enable-scale-out",  # /inference/v1/generate
    "--enable-prompt-tokens-details",  # what was read from the prefix cache, and written to it
)  # fmt: skip
OURS: dict[str, Any] = {"kv_eviction": "layer-defensivekv", "kv_eviction_keep": 0.25}
LENGTHS = (700, 40, 1333, 96, 640)  # two of them below min_tokens
CHAT = [{"role": "user", "content": "a lighthouse and its keeper " * 30}]
FLOAT_NOISE = 2e-4  # a few hundred float32 roundings of logits up to 16


def prompt_of(length: int, seed: int) -> list[int]:
    return [2 + (11 * i + 101 * seed + i * i) % 500 for i in range(length)]


PROMPTS = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tiny_model, FLAGS, tmp_path_factory.mktemp("shapes") / "log") as server:
        yield server


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": "tiny", **body}, timeout=120)


def complete(server: Server, **body: Any) -> list[dict[str, Any]]:
    """The choices of a completion; those of a stream, put together from its events."""
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    reply = post(server, "/v1/completions", **body).raise_for_status()
    if not body.get("stream"):
        return reply.json()["choices"]
    choices: dict[int, dict[str, Any]] = {}
    for line in reply.text.splitlines():
        if line.startswith("data: {"):
            for part in json.loads(line.removeprefix("data: "))["choices"]:
                choice = choices.setdefault(part["index"], {"index": part["index"], "token_ids": []})
                choice["token_ids"] += part["token_ids"] or []
    assert reply.text.rstrip().endswith("data: [DONE]")
    return [choices[index] for index in sorted(choices)]


def tokens_of(choices: list[dict[str, Any]]) -> list[list[int]]:
    return [choice["token_ids"] for choice in choices]


def evicted(server: Server) -> float:
    return server.metric("vllm:kv_eviction_requests_total")


STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@STREAMS
def test_several_answers_to_one_prompt_are_each_evicted(server: Server, stream: bool) -> None:
    sure = {"prompt": PROMPTS[0], "temperature": 1, "top_k": 1}  # vLLM takes n > 1 only of what it calls random
    (alone,), (whole,) = (tokens_of(complete(server, **sure, vllm_xargs=fields)) for fields in (OURS, None))
    assert alone != whole, "else nothing was lost, and the comparison could not fail"
    before = evicted(server)
    count = 2 if stream else 3
    answers = tokens_of(complete(server, **sure, n=count, vllm_xargs=OURS, stream=stream))
    assert answers == [alone] * count
    assert evicted(server) == before + count


@STREAMS
def test_each_prompt_of_a_list_is_evicted_by_its_own_length(server: Server, stream: bool) -> None:
    alone = [tokens_of(complete(server, prompt=prompt, vllm_xargs=OURS))[0] for prompt in PROMPTS]
    before = evicted(server)
    assert tokens_of(complete(server, prompt=PROMPTS, vllm_xargs=OURS, stream=stream)) == alone
    assert evicted(server) == before + sum(length >= 100 for length in LENGTHS) == before + 3


@STREAMS
def test_a_boundary_that_one_prompt_of_a_list_does_not_reach_refuses_them_all(server: Server, stream: bool) -> None:
    before = server.metric("vllm:prompt_tokens_total")
    body = {"prompt": PROMPTS, "vllm_xargs": {**OURS, "kv_eviction_boundary": 100}, "stream": stream}
    reply = post(server, "/v1/completions", **body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("kv_eviction_boundary=100: the prompt has 40 tokens")
    assert server.metric("vllm:prompt_tokens_total") == before, "the engine has seen none of them"


def test_a_prompts_own_scores_see_all_of_it_up_to_the_eviction(server: Server) -> None:
    boundary, prompt = 576, PROMPTS[0]  # whole blocks

    def scores(**fields: Any) -> list[float]:
        (choice,) = complete(server, prompt=prompt, echo=True, logprobs=1, max_tokens=2, vllm_xargs=fields)
        first, *rest = choice["logprobs"]["token_logprobs"]
        assert first is None and len(rest) == len(prompt) - 1 + 2
        return rest

    def difference(ours: list[float], tokens: slice) -> float:
        return max(abs(a - b) for a, b in zip(ours[tokens], whole[tokens], strict=True))

    # The score of token t + 1 is computed from token t, at index t.
    whole = scores(kv_eviction="none")
    at_the_end = scores(**OURS)
    assert difference(at_the_end, slice(len(prompt))) <= FLOAT_NOISE
    inside = scores(**OURS, kv_eviction_boundary=boundary)
    assert difference(inside, slice(boundary)) <= FLOAT_NOISE
    assert difference(inside, slice(boundary, len(prompt) - 1)) > 0.05, "these saw what was kept"


@STREAMS
def test_anthropic_messages_take_and_refuse_fields(server: Server, stream: bool) -> None:
    body = {"messages": CHAT, "max_tokens": 8, "stream": stream}
    before = evicted(server)
    reply = post(server, "/v1/messages", **body, vllm_xargs=OURS).raise_for_status()
    assert ("message_stop" in reply.text) if stream else reply.json()["usage"]["output_tokens"] > 0
    assert evicted(server) == before + 1
    for value, allowed in ((7, "=7: choose a number in (0, 1]"), (True, "=True: choose a number in (0, 1]")):
        wrong = post(server, "/v1/messages", **body, vllm_xargs={**OURS, "kv_eviction_keep": value})
        assert wrong.status_code == 400 and f"kv_eviction_keep{allowed}" in wrong.json()["error"]["message"]
    assert evicted(server) == before + 1


def test_what_is_written_to_the_prefix_cache_is_told_with_a_boundary_too(server: Server) -> None:
    """In blocks of 32 tokens: all up to the boundary, less what was there already."""
    words = "a keeper writes the weather of every night into a book " * 20
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 4}
    fields = {**OURS, "kv_eviction_boundary": 200, "kv_eviction_reuse": "off"}
    first, again = (
        post(server, "/v1/messages", **body, vllm_xargs=fields).raise_for_status().json()["usage"] for _ in range(2)
    )
    assert (first["cache_creation_input_tokens"], first["cache_read_input_tokens"]) == (192, 0)
    read = again["cache_read_input_tokens"]
    assert 128 <= read < 192 and again["cache_creation_input_tokens"] == 192 - read


def test_a_stop_string_does_not_cost_the_report(server: Server) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    text = post(server, "/v1/completions", **body, vllm_xargs=OURS).json()["choices"][0]["text"]
    reply = post(server, "/v1/completions", **body, stop=[text[20:24]], vllm_xargs={**OURS, "kv_eviction_report": 1})
    answer = reply.raise_for_status().json()
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["stop_reason"] == text[20:24]
    told = answer["kv_transfer_params"]["kv_eviction"]
    assert (told["policy"], told["prompt_tokens"]) == ("layer-defensivekv", 700) and 175 <= told["kept_tokens"] < 240


@STREAMS
def test_tokens_in_tokens_out_takes_and_refuses_fields(server: Server, stream: bool) -> None:
    def ask(**fields: Any) -> httpx.Response:
        params = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "extra_args": {**OURS, **fields}}
        return post(server, "/inference/v1/generate", token_ids=PROMPTS[0], sampling_params=params, stream=stream)

    before = evicted(server)
    assert ask().status_code == 200 and evicted(server) == before + 1
    for field, value in (("kv_eviction_keep", 7), ("kv_eviction_boundary", 701), ("kv_eviction_boundary", True)):
        wrong = ask(**{field: value})
        assert wrong.status_code == 400 and f"{field}={value}: " in wrong.json()["error"]["message"]
    assert evicted(server) == before + 1


@pytest.mark.parametrize(
    "path, prompt", [("completions", {"prompt": PROMPTS[0]}), ("chat/completions", {"messages": CHAT})]
)
def test_beam_search_is_left_alone_and_refuses_fields(server: Server, path: str, prompt: dict[str, Any]) -> None:
    beams = {**prompt, "use_beam_search": True, "n": 2, "max_tokens": 3, "temperature": 0}
    before = evicted(server)
    answer = post(server, f"/v1/{path}", **beams).raise_for_status().json()
    assert len(answer["choices"]) == 2 and answer["usage"]["completion_tokens"] == 6
    for field, value in (("kv_eviction", "snapkv"), ("kv_eviction_keep", 7), ("kv_eviction_ratio", 1)):
        wrong = post(server, f"/v1/{path}", **beams, vllm_xargs={"other": 1, field: value})
        assert wrong.status_code == 400
        assert f"{field}={value!r}: has no effect with use_beam_search" in wrong.json()["error"]["message"]
    assert evicted(server) == before


def test_a_batch_of_chats_takes_and_refuses_fields(server: Server) -> None:
    """vLLM passes the fields on, though its protocol does not name them; reports it drops."""
    chats = [CHAT, [{"role": "user", "content": "a harbour in the rain " * 40}]]
    body = {"messages": chats, "max_tokens": 8, "temperature": 0}
    path, before = "/v1/chat/completions/batch", evicted(server)
    answer = post(server, path, **body, vllm_xargs={**OURS, "kv_eviction_report": 1}).raise_for_status().json()
    assert len(answer["choices"]) == 2 and answer["kv_transfer_params"] is None
    assert evicted(server) == before + 2
    for value in (7, True):
        wrong = post(server, path, **body, vllm_xargs={**OURS, "kv_eviction_keep": value})
        assert wrong.status_code == 400
        assert f"kv_eviction_keep={value}: choose a number" in wrong.json()["error"]["message"]
    assert evicted(server) == before + 2


def test_the_engine_has_logged_no_error(server: Server) -> None:
    """Last of the file. vLLM logs what it refuses, as an error, but none of these may be one of ours."""
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert math.isclose(server.metric("vllm:num_requests_running"), 0)
    assert "EngineDeadError" not in server.log_tail(10**6)

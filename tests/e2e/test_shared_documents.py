"""A chat of five turns and twenty questions about one document: the prefix is hit after eviction, with the answers of a
cache that knows nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK = 32
HITS = "vllm:kv_eviction_prefix_hit_tokens_total"
FLAGS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096",
    "--block-size", str(BLOCK), "--num-gpu-blocks-override", "400", "--enable-prompt-tokens-details",
    "--kv-eviction", "layer-defensivekv", "--kv-eviction-keep", "0.3", "--kv-eviction-min-tokens", "100",
    # What is kept must not depend on who else is there, or answers could not be compared.
    "--kv-eviction-shared", "evict",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def server(tiny_model: Path, folder: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /reset_prefix_cache
        with Server(tiny_model, FLAGS, folder / "server.log") as server:
            yield server


def ask(server: Server, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Text, token ids and usage of a greedy answer of 24 tokens."""
    body = {
        "model": "tiny", "messages": list(messages), "max_tokens": 24, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    choice = reply["choices"][0]
    return {"text": choice["message"]["content"], "tokens": choice["token_ids"], **reply["usage"]}


def cached(answer: dict[str, Any]) -> int:
    return int((answer["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def forget(server: Server) -> None:
    assert httpx.post(f"{server.url}/reset_prefix_cache", timeout=30).status_code == 200


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5)) for _ in range(count))


def chat(server: Server) -> list[tuple[list[dict[str, str]], dict[str, Any]]]:
    """Five turns, each with all before it: (messages, answer)."""
    messages: list[dict[str, str]] = []
    turns = []
    for turn in range(5):
        messages = [*messages, user(words(turn, 60 if turn else 200))]
        answer = ask(server, messages)
        turns.append((messages, answer))
        messages = [*messages, {"role": "assistant", "content": answer["text"]}]
    return turns


def test_each_turn_of_a_chat_hits_the_prompt_before_it(server: Server) -> None:
    forget(server)
    evicted, hit = server.metric("vllm:kv_eviction_requests_total"), server.metric(HITS)
    turns = chat(server)
    assert server.metric("vllm:kv_eviction_requests_total") == evicted + 5, "every turn was evicted"
    assert server.metric(HITS) - hit == sum(cached(answer) for _, answer in turns)
    assert cached(turns[0][1]) == 0
    for (_, before), (_, answer) in pairwise(turns):
        # All whole blocks of the last prompt; its answer was computed from an evicted context, and is not handed out.
        assert cached(answer) == before["prompt_tokens"] // BLOCK * BLOCK
    for messages, answer in turns:
        forget(server)
        fresh = ask(server, messages)
        assert cached(fresh) == 0 and fresh["tokens"] == answer["tokens"]


def test_twenty_questions_hit_their_document(server: Server) -> None:
    forget(server)
    document = words(100, 400)
    questions = [[user(f"{document}. {words(200 + i, 12)}?")] for i in range(20)]
    evicted = server.metric("vllm:kv_eviction_requests_total")
    answers = [ask(server, question) for question in questions]
    assert server.metric("vllm:kv_eviction_requests_total") == evicted + 20
    length = ask(server, [user(document)])["prompt_tokens"]
    for answer in answers[1:]:
        assert cached(answer) >= (length - 2) // BLOCK * BLOCK, (
            "all of the document, and the first question paid for it"
        )
    assert len({tuple(answer["tokens"]) for answer in answers}) > 10, "the questions matter"
    for question, answer in zip(questions, answers, strict=True):
        forget(server)
        fresh = ask(server, question)
        assert cached(fresh) == 0 and fresh["tokens"] == answer["tokens"]


@pytest.mark.nightly
def test_a_forgotten_cache_stands_for_a_fresh_server(server: Server, tiny_model: Path, folder: Path) -> None:
    forget(server)
    messages, answer = chat(server)[-1]
    assert cached(answer) > 0
    with Server(tiny_model, FLAGS, folder / "fresh.log") as fresh:
        assert ask(fresh, messages)["tokens"] == answer["tokens"]

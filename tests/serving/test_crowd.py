"""Many clients ask about one new document at the same time, over HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import Server
from tests.e2e.engines import random_prompts

pytestmark = [pytest.mark.nightly, pytest.mark.e2e]

FLAGS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    "--kv-eviction", "snapkv", "--kv-eviction-keep", "0.25", "--kv-eviction-min-tokens", "100",
)  # fmt: skip
CLIENTS, DOCUMENT = 200, 700


async def ask_all(url: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    fields = {"kv_eviction_boundary": DOCUMENT, "kv_eviction_report": 1}
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "vllm_xargs": fields}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits) as client:
        replies = await asyncio.gather(
            *(client.post("/v1/completions", json={**body, "prompt": prompt}) for prompt in prompts)
        )
    return [reply.raise_for_status().json() for reply in replies]


def test_of_two_hundred_questions_about_a_new_document_one_packs(tiny_model: Path, tmp_path: Path) -> None:
    (document,) = random_prompts([DOCUMENT], seed=5)
    prompts = [document + question for question in random_prompts([20] * CLIENTS, seed=6)]
    with Server(tiny_model, FLAGS, tmp_path / "log") as server:
        answers = asyncio.run(ask_all(server.url, prompts))
        counted = {
            name: server.metric(f"vllm:{name}_total")
            for name in ("kv_eviction_requests", "kv_eviction_adoptions", "kv_eviction_published", "num_preemptions")
        }
    assert all(answer["usage"]["completion_tokens"] == 8 for answer in answers)
    adopted = [answer["kv_transfer_params"]["kv_eviction"]["adopted"] for answer in answers]
    assert sorted(adopted) == [False] + [True] * (CLIENTS - 1)
    assert list(counted.values()) == [1, CLIENTS - 1, 1, 0], counted

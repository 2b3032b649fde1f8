"""What only vLLM's asynchronous engine does, with its core in a process of its own: sessions, pauses, sleep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vllm_defensive
from tests.e2e.engines import audit_of, random_prompts
from tests.reference_model import ReferenceLlama, decode_logprobs

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.e2e]

PROMPTS = random_prompts((700, 333, 40), seed=21)
TOKENS = 60
FLOAT_NOISE = 3e-4  # see test_memory.py


def parameters(num_tokens: int = TOKENS, **more: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA
    more = {"temperature": 0, "ignore_eos": True, "logprobs": 1, "output_kind": kind, **more}
    return SamplingParams(max_tokens=num_tokens, **more)


class Reply:
    """What has come of one request. finish_reason: None until it has ended."""

    def __init__(self, engine: Any, prompt: Any, name: str, num_tokens: int = TOKENS) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self.task = asyncio.create_task(self._collect(engine.generate(prompt, parameters(num_tokens), name)))

    async def _collect(self, outputs: AsyncIterator[Any]) -> None:
        async for output in outputs:
            part = output.outputs[0]
            self.tokens += part.token_ids
            self.logprobs += [d[t].logprob for d, t in zip(part.logprobs or (), part.token_ids, strict=True)]
            self.finish_reason = part.finish_reason


async def begin(engine: Any, name: str) -> list[Reply]:
    """Ask all prompts, and return once each has begun to answer."""
    replies = [Reply(engine, {"prompt_token_ids": prompt}, f"{name}{i}") for i, prompt in enumerate(PROMPTS)]
    while not all(reply.tokens for reply in replies):
        await asyncio.sleep(0.01)
    return replies


async def end(replies: list[Reply]) -> list[list[int]]:
    await asyncio.gather(*(reply.task for reply in replies))
    return [reply.tokens for reply in replies]


async def session(engine: Any, reference: ReferenceLlama) -> None:
    """Two inputs, each with its answer, beside requests that are evicted."""
    from vllm.engine.protocol import StreamingInput

    first, second = random_prompts((400, 300), seed=22)

    async def inputs() -> AsyncIterator[Any]:
        for piece in (first, second):
            yield StreamingInput({"type": "token", "prompt_token_ids": list(piece)})  # vLLM appends to it

    reply = Reply(engine, inputs(), "session", num_tokens=8)
    await reply.task
    assert len(reply.tokens) == 16
    found: Tensor = torch.tensor(reply.logprobs, dtype=torch.float64)
    # vLLM takes the last token of an answer back before the next input.
    for context, part in ((first, slice(8)), (first + reply.tokens[:7] + second, slice(8, 16))):
        expected = decode_logprobs(reference, context, reply.tokens[part], None)
        assert float((found[part] - expected).abs().max()) <= FLOAT_NOISE


async def paused(engine: Any, mode: str, clear: bool) -> list[Reply]:
    """Requests that were stopped amid their answers, and went on."""
    replies = await begin(engine, f"{mode}-{clear}-")
    await engine.pause_generation(mode=mode, clear_cache=clear)
    before = [len(reply.tokens) for reply in replies]
    await asyncio.sleep(0.3)
    assert [len(reply.tokens) for reply in replies] == before
    await engine.resume_generation()
    return replies


async def slept(engine: Any) -> list[Reply]:
    replies = await begin(engine, "asleep")
    await engine.sleep(level=1, mode="keep")
    await engine.wake_up()
    return replies


async def run(model: Path, audits: Path) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        str(model), dtype="float32", enforce_eager=True, max_num_batched_tokens=512, enable_sleep_mode=False,
        **vllm_defensive.engine_kwargs("layer-defensivekv", keep=0.3, min_tokens=100, audit=str(audits)),
    )  # fmt: skip
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        expected = await end(await begin(engine, "plain"))
        assert await engine.reset_prefix_cache()
        others = await begin(engine, "beside")
        await session(engine, ReferenceLlama(model))
        assert await end(others) == expected
        assert not list(audits.glob("session*")) and audit_of(audits, "plain0").stop == 700
        assert await engine.reset_prefix_cache(), "all blocks are returned"
        for mode, clear in (("keep", False), ("keep", True), ("wait", True)):
            assert await end(await paused(engine, mode, clear)) == expected, (mode, clear)
        assert await end(await slept(engine)) == expected
        aborted = await paused(engine, "abort", True)
        await end(aborted)
        assert {reply.finish_reason for reply in aborted} == {"abort"}
        assert await engine.reset_prefix_cache(), "all blocks are returned"
        assert await end(await begin(engine, "again")) == expected
    finally:
        engine.shutdown()


@pytest.mark.timeout(300)
def test_sessions_pauses_and_sleep_beside_eviction(tiny_model: Path, tmp_path: Path) -> None:
    asyncio.run(run(tiny_model, tmp_path))

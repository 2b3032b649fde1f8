"""Echoes on the CUDA platform: what is kept is what plain formulas choose from a plain model that repeats the prompt.

`tests/e2e/test_echo.py` has the formulas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cuda import graphs
from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.e2e import test_echo as formulas
from tests.e2e.engines import assert_all_returned, generate, random_prompts, worker_of
from tests.e2e.test_kept_sets import KEEP, Scores
from tests.reference_model import ReferenceLlama
from vllm_defensive import packing
from vllm_defensive.plan import StepMessage
from vllm_defensive.worker.cuda import launches

pytestmark = pytest.mark.e2e

POLICIES = ("kvzip", "echokv")
PART = 70
PROMPTS = random_prompts((130, 161), seed=6)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[Scores]]:
    """By policy, the scores of each prompt."""
    reference, instruction = ReferenceLlama(model), formulas.instruction_of(model)
    return {
        policy: [formulas.naive_scores(policy, reference, prompt, instruction, PART) for prompt in PROMPTS]
        for policy in POLICIES
    }


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "ECHO_TOKENS", PART)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each echo whose queries were looked at, once a layer."""
    seen: list[int] = []
    reconstruct = launches.reconstruct

    def noted(row: launches.EchoRow, *args: Any, **kwargs: Any) -> None:
        seen.append(row.tokens.stop - row.tokens.start)
        reconstruct(row, *args, **kwargs)

    monkeypatch.setattr(launches, "reconstruct", noted)
    return seen


def settings(folder: Path) -> dict[str, Any]:
    """With pages of 32 tokens, as the formulas are written for."""
    return {"dtype": "float32", "audit": str(folder), "block_size": 32, "shared": "evict", "reuse": "off"}


@pytest.mark.nightly
@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_kept_sets_are_those_of_a_model_that_repeats_the_prompt(
    model: Path, expected: dict[str, list[Scores]], tmp_path: Path, kernels: str
) -> None:
    """Of prompts that end there or go on behind a boundary, beside requests that are evicted otherwise or not at all;
    a second time the prefix cache has them."""
    rows = [(policy, i, own) for policy in expected for i in range(len(PROMPTS)) for own in (0, 40)]
    rest = random_prompts((40,), seed=9)[0]
    fields = [
        {"kv_eviction": policy, "kv_eviction_keep": KEEP, **({"kv_eviction_boundary": len(PROMPTS[i])} if own else {})}
        for policy, i, own in rows
    ]
    prompts = [PROMPTS[i] + rest[:own] for _, i, own in rows] + random_prompts((100, 75), seed=8)
    fields += [{"kv_eviction": "snapkv"}, {"kv_eviction": "none"}]
    with engine(model, "snapkv", max_num_batched_tokens=64, max_num_seqs=16, **settings(tmp_path)) as llm:
        turns = [generate(llm, prompts, 8, extra_args=fields) for _ in range(2)]
        assert_all_returned(llm)
        runtime = worker_of(llm)._runtime
        runtime.begin(StepMessage(), ())
        assert not runtime.reconstructions._seen and not runtime._held and not runtime.windows._buffers
    assert all(answer.cached_tokens > 0 for answer in turns[1][: len(rows)])
    for turn in turns:
        for (policy, i, _), answer in zip(rows, turn, strict=False):
            formulas.assert_kept(tmp_path, policy, PROMPTS[i], expected[policy][i], answer.request_id)


@pytest.mark.nightly
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_the_kernels_keep_the_same(model: Path, tmp_path: Path, kernels: str, kernel_calls: dict[str, int]) -> None:
    """Of a prompt of three pages: the interpreter takes long."""
    reference, instruction, prompt = ReferenceLlama(model), formulas.instruction_of(model), PROMPTS[0][:97]
    fields = [{"kv_eviction": policy, "kv_eviction_keep": KEEP} for policy in POLICIES]
    with engine(model, "snapkv", **settings(tmp_path)) as llm:
        answers = generate(llm, [prompt] * len(fields), 2, extra_args=fields)
    assert kernel_calls["reconstruction_scores"] >= 2 * 2 * 2, "of two prompts, in two parts, two layers"
    assert kernel_calls["window_scores"] == 1, "kvzip reads none"
    for policy, answer in zip(POLICIES, answers, strict=True):
        scores = formulas.naive_scores(policy, reference, prompt, instruction, PART)
        formulas.assert_kept(tmp_path, policy, prompt, scores, answer.request_id)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_a_last_chunk_of_one_token_is_looked_at(
    model: Path, expected: dict[str, list[Scores]], tmp_path: Path, kernels: str, eager: bool, chunks: list[int]
) -> None:
    """It counts as decode, and a graph of the whole model must not swallow it. Nobody else is there, so that an echo
    has the whole of a step."""
    arguments = {"enforce_eager": eager, "max_num_seqs": 4, **settings(tmp_path)}
    if not eager and MODE == "pretend":  # nothing compiled, so no graphs in pieces
        sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 4]}
        arguments["compilation_config"] = {"custom_ops": ["none"], "mode": 0, **sizes}
    size = len(formulas.instruction_of(model)) + PART - 1
    graphs.replays[0] = 0
    with engine(model, "kvzip", max_num_batched_tokens=size, keep=KEEP, **arguments) as llm:
        (answer,) = generate(llm, PROMPTS[:1], 8)
    assert chunks[:4] == [size, size, 1, 1], "of two layers"
    assert eager or MODE != "pretend" or graphs.replays[0] == 7, "the answer's steps, and no others"
    formulas.assert_kept(tmp_path, "kvzip", PROMPTS[0], expected["kvzip"][0], answer.request_id)

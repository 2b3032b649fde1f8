"""Keeping everything gives what stock vLLM gives, whatever the block size, the scheduling and the memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engines import (
    MIXED,
    Answer,
    assert_all_returned,
    engine,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    scheduler_of,
)
from tests.processes import environment

pytestmark = pytest.mark.e2e


PROMPTS = random_prompts(MIXED)
# Together they outgrow 48 blocks of 32 by far; each of them alone, packed copy included, fits.
CROWD = random_prompts((300, 260, 100, 290, 250, 90, 31), seed=2)
CROWD_TOKENS = 160
ROUNDING = 1e-4  # a few hundred float32 roundings of logits up to 16
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Callable[[int], list[Answer]]:
    """Stock vLLM's answers to the mixed batch, computed once for each block size. In float32: in bf16 two tokens may be
    as likely, and which one is chosen depends on the machine."""

    @cache
    def answers(block_size: int) -> list[Answer]:
        with engine(tiny_model, dtype="float32", block_size=block_size) as llm:
            return generate(llm, PROMPTS)

    return answers


@MODES
@pytest.mark.parametrize("block_size", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_keep_all_equals_stock(tiny_model: Path, stock: Any, block_size: int, asynchronous: bool) -> None:
    expected = stock(block_size)
    with engine(tiny_model, "keep-all", dtype="float32", block_size=block_size, asynchronous=asynchronous) as llm:
        assert ("Async" in type(scheduler_of(llm)).__name__) == asynchronous
        for turn in range(2):
            answers = generate(llm, PROMPTS)
            assert largest_difference(answers, expected) <= ROUNDING
            hits = sum(a.cached_tokens for a in answers)
            assert hits > 0.9 * sum(MIXED) if turn else hits == 0
        assert metrics_of(llm)["vllm:kv_eviction_requests"] == 2 * sum(n >= max(block_size, 33) for n in MIXED)
        assert_all_returned(llm)


@pytest.mark.slow
@MODES
def test_keep_all_equals_stock_when_requests_are_thrown_out(tiny_model: Path, asynchronous: bool) -> None:
    """In float32: in bf16, stock vLLM itself answers differently once it has computed an answer's tokens anew."""
    with engine(tiny_model, dtype="float32") as llm:
        expected = generate(llm, CROWD, CROWD_TOKENS)
        assert metrics_of(llm)["vllm:num_preemptions"] == 0
    small = {"max_model_len": 512, "num_gpu_blocks_override": 49, "asynchronous": asynchronous}
    with engine(tiny_model, "keep-all", dtype="float32", **small) as llm:
        answers = generate(llm, CROWD, CROWD_TOKENS)
        assert metrics_of(llm)["vllm:num_preemptions"] > 0
        assert largest_difference(answers, expected) <= ROUNDING
        assert_all_returned(llm)


OWN_PROCESS = """
import sys, torch
from pathlib import Path
from tests.e2e.engines import MIXED, generate, make_llm, random_prompts
if __name__ == "__main__":
    llm = make_llm(Path(sys.argv[1]), sys.argv[2] or None, dtype="float32")
    answers = [generate(llm, random_prompts(MIXED)) for _ in range(2)]
    torch.save([[(a.tokens, a.logprobs, a.cached_tokens) for a in turn] for turn in answers], sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_keep_all_equals_stock_with_the_engine_in_its_own_process(tiny_model: Path, stock: Any, tmp_path: Path) -> None:
    script, result = tmp_path / "run.py", tmp_path / "answers.pt"
    script.write_text(OWN_PROCESS)
    subprocess.run(
        [sys.executable, str(script), str(tiny_model), "keep-all", str(result)],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
        check=True,
        timeout=550,
    )
    for turn in torch.load(result):
        answers = [Answer(tokens, logprobs, "", cached) for tokens, logprobs, cached in turn]
        assert largest_difference(answers, stock(32)) <= ROUNDING

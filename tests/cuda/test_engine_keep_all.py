"""Keeping everything gives what stock vLLM gives on this platform: in mixed batches, after prefix hits, preempted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.engines import engine
from tests.e2e.engines import (
    assert_all_returned,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    scheduler_of,
)

pytestmark = pytest.mark.e2e

# Lengths above and below a chunk of 128, whole blocks and not, below the window; a last chunk of one token.
FP16_STEP = 2**-7  # between numbers in [8, 16), where the tiny model's largest logits are
MIXED = random_prompts((300, 129, 40, 17, 256, 3))
REFERENCE = pytest.mark.parametrize("kernels", ["reference"], indirect=True)


@pytest.mark.parametrize(
    ("attention_backend", "dtype", "tolerance", "kernels"),
    [
        ("TRITON_ATTN", "float32", 1e-4, "reference"),  # a few hundred roundings of logits up to 16
        ("FLASH_ATTN", "float16", 2 * FP16_STEP, "triton"),  # rounds attention's weights where our kernel does not
    ],
    ids=["triton", "flash"],
    indirect=["kernels"],
)
def test_keep_all_equals_stock(
    model: Path, attention_backend: str, dtype: str, tolerance: float, kernels: str, kernel_calls: dict[str, int]
) -> None:
    choice = {"attention_backend": attention_backend, "dtype": dtype}
    tokens, turns = (8, 2) if kernels == "reference" else (3, 1)
    with engine(model, **choice) as llm:
        expected = generate(llm, MIXED, tokens)
    assert not kernel_calls
    with engine(model, "keep-all", **choice) as llm:
        assert "Async" in type(scheduler_of(llm)).__name__
        for turn in range(turns):
            answers = generate(llm, MIXED, tokens)
            assert largest_difference(answers, expected) <= tolerance
            assert bool(sum(a.cached_tokens for a in answers)) == bool(turn)
        assert metrics_of(llm)["vllm:kv_eviction_requests"] == turns * 4
        # What the device knew came back with a later output: of two layers, which are deciles 0 and 5, every page.
        assert metrics_of(llm)["vllm:kv_eviction_seconds"] > 0
        pages = [m.value for m in llm.get_metrics() if m.name == "vllm:kv_eviction_kept_pages" and m.value]
        assert pages == [turns * 2 * sum(len(p) // 16 for p in MIXED if len(p) >= 33)] * 2
        assert kernel_calls["compact"] == turns * 4
        assert kernel_calls["ragged_paged_decode"] >= turns * 2 * tokens
        assert_all_returned(llm)


@REFERENCE
def test_keep_all_equals_stock_when_requests_are_thrown_out(model: Path, kernels: str) -> None:
    prompts, tokens = random_prompts((40, 41, 45), seed=2), 30
    with engine(model, dtype="float32") as llm:
        expected = generate(llm, prompts, tokens)
        assert metrics_of(llm)["vllm:num_preemptions"] == 0
    small = {"max_model_len": 80, "num_gpu_blocks_override": 12, "dtype": "float32"}
    with engine(model, "keep-all", **small) as llm:
        answers = generate(llm, prompts, tokens)
        assert metrics_of(llm)["vllm:num_preemptions"] > 0
        assert largest_difference(answers, expected) <= 1e-4  # as above
        assert_all_returned(llm)

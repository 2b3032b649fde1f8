"""Keeping everything gives what stock vLLM gives, whatever a model's attention: see `test_attention_features.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_model
from tests.e2e.engines import assert_all_returned, engine, generate, largest_difference, metrics_of, random_prompts

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.e2e]

FLOAT_NOISE = 2e-4  # a few hundred float32 roundings of logits up to 16


@pytest.fixture(scope="module", params=["gemma2", "granite_swa", "gpt_oss", "gemma4_e"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(tiny_model, f"write_tiny_{request.param}")(tmp_path_factory.mktemp(request.param))


def test_keep_all_equals_stock_and_the_prefix_cache_is_hit(folder: Path) -> None:
    prompts = random_prompts((700, 40, 1333, 17, 96, 640))
    with engine(folder, dtype="float32") as llm:
        expected = generate(llm, prompts, 32)
    with engine(folder, "keep-all", dtype="float32") as llm:
        for turn in range(2):
            answers = generate(llm, prompts, 32)
            assert largest_difference(answers, expected) <= FLOAT_NOISE
            hits = sum(answer.cached_tokens for answer in answers)
            assert hits > 0.8 * sum(map(len, prompts)) if turn else hits == 0
        assert_all_returned(llm)


def test_keep_all_equals_stock_when_requests_are_thrown_out(folder: Path) -> None:
    prompts = random_prompts([170] * 6, seed=9)
    with engine(folder, dtype="float32") as llm:
        expected = generate(llm, prompts, 120)
    small = {"max_model_len": 384, "num_gpu_blocks_override": 60, "dtype": "float32"}
    with engine(folder, "keep-all", **small) as llm:
        answers = generate(llm, prompts, 120)
        assert metrics_of(llm)["vllm:num_preemptions"] > 0
        assert largest_difference(answers, expected) <= FLOAT_NOISE
        assert_all_returned(llm)

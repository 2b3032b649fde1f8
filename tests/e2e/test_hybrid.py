"""Models with sliding-window and global layers: the former stay as they are, the latter are evicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.engines import (
    BF16_STEP,
    MIXED,
    assert_all_returned,
    audit_of,
    engine,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    scheduler_of,
)
from tests.tiny_model import write_tiny_gemma3

pytestmark = pytest.mark.e2e

PROMPTS = random_prompts(MIXED)


def test_keep_all_equals_stock_and_the_prefix_cache_is_hit(tiny_gemma3: Path, tmp_path: Path) -> None:
    with engine(tiny_gemma3) as llm:
        expected = generate(llm, PROMPTS, 32)
    with engine(tiny_gemma3, "keep-all", audit=str(tmp_path)) as llm:
        assert len(scheduler_of(llm).kv_cache_config.kv_cache_groups) == 3
        for turn in range(2):
            answers = generate(llm, PROMPTS, 32)
            assert largest_difference(answers, expected) <= BF16_STEP
            hits = sum(a.cached_tokens for a in answers)
            assert hits > 0.9 * sum(MIXED) if turn else hits == 0
        assert audit_of(tmp_path, answers[0].request_id).kept_counts.shape == (2, 2)  # global layers, KV heads
        assert_all_returned(llm)


def test_global_layers_are_evicted_and_their_blocks_freed(tiny_gemma3: Path) -> None:
    with engine(tiny_gemma3, "layer-defensivekv", keep=0.25) as llm:
        generate(llm, random_prompts([1000] * 3), 8)
        metrics = metrics_of(llm)
        assert metrics["vllm:kv_eviction_requests"] == 3
        assert metrics["vllm:kv_eviction_freed_blocks"] == 3 * (31 - 8)
        assert_all_returned(llm)


def test_a_global_layer_may_come_first(tmp_path: Path) -> None:
    model = write_tiny_gemma3(tmp_path / "model", global_first=True)
    with engine(model, "snapkv", keep=0.25) as llm:
        generate(llm, random_prompts([1000]), 4)
        assert metrics_of(llm)["vllm:kv_eviction_freed_blocks"] == 31 - 8

"""Models with sliding-window and global layers: the former stay as they are, the latter are evicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm.v1.kv_cache_interface import SlidingWindowSpec

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
from tests.tiny_model import write_tiny_gemma3, write_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = random_prompts(MIXED)
FLOAT_NOISE = 1e-4  # a few hundred float32 roundings of logits up to 16


def test_keep_all_equals_stock_and_the_prefix_cache_is_hit(tiny_gemma3: Path, tmp_path: Path) -> None:
    """In float32: a hit cuts the prompt into other chunks, which in bf16 turns a near tie on some processors."""
    with engine(tiny_gemma3, dtype="float32") as llm:
        expected = generate(llm, PROMPTS, 32)
    with engine(tiny_gemma3, "keep-all", dtype="float32", audit=str(tmp_path)) as llm:
        assert len(scheduler_of(llm).kv_cache_config.kv_cache_groups) == 3
        for turn in range(2):
            answers = generate(llm, PROMPTS, 32)
            assert largest_difference(answers, expected) <= FLOAT_NOISE
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


@pytest.mark.parametrize("window", [2048, pytest.param(3072, marks=pytest.mark.nightly)])
def test_a_window_that_no_request_outgrows_is_full_attention(tmp_path: Path, window: int) -> None:
    """All layers of such a model are evicted: keep-all equals stock, and what a policy drops goes back to the pool."""
    model = with_window(write_tiny_llama(tmp_path / "model"), window)
    prompts = random_prompts((700, 40, 1333, 17))
    with engine(model, max_model_len=2048) as llm:
        assert isinstance(scheduler_of(llm).kv_cache_config.kv_cache_groups[0].kv_cache_spec, SlidingWindowSpec)
        expected = generate(llm, prompts, 32)
    with engine(model, "keep-all", max_model_len=2048) as llm:
        assert largest_difference(generate(llm, prompts, 32), expected) <= BF16_STEP
        assert_all_returned(llm)
    with engine(model, "snapkv", keep=0.25, max_model_len=2048, audit=str(tmp_path / "audits")) as llm:
        (answer,) = generate(llm, random_prompts([1000]), 4)
        assert metrics_of(llm)["vllm:kv_eviction_freed_blocks"] == 31 - 8
        assert audit_of(tmp_path / "audits", answer.request_id).kept_counts.shape == (3, 2)
        assert_all_returned(llm)


def test_a_window_that_requests_outgrow_is_still_refused(tmp_path: Path) -> None:
    model = with_window(write_tiny_llama(tmp_path / "model"), 2047)
    refused = engine(model, "snapkv", max_model_len=2048)
    with pytest.raises(ValueError, match="has 0 groups of full-attention layers"), refused:
        pass


def with_window(model: Path, window: int) -> Path:
    """A Llama as a Mistral, which it equals but for the window that all layers have."""
    file = model / "config.json"
    changes = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return model


def test_a_manager_for_one_kind_of_cache_is_refused_at_start_by_its_flag(tiny_gemma3: Path) -> None:
    refused = engine(tiny_gemma3, "snapkv", disable_hybrid_kv_cache_manager=True)
    with pytest.raises(ValueError, match=r"^disable_hybrid_kv_cache_manager=True: .*drop --disable-hybrid"), refused:
        pass

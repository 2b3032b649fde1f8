"""A pool that is too small: refused at start if it is too small for the settings, served as is if for one request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.engines import assert_all_returned, audit_of, engine, generate, metrics_of, random_prompts
from tests.reference_model import ReferenceLlama, decode_logprobs

pytestmark = pytest.mark.e2e

# 1,024 tokens are 32 blocks; a tenth of them is packed into 4.
LIMITS = {"max_model_len": 1024, "keep": 0.1, "dtype": "float32"}
ENOUGH = 32 + 4 + 1  # and vLLM's null block


def test_a_pool_in_which_the_longest_prompt_cannot_be_evicted_is_refused_at_start(tiny_model: Path) -> None:
    too_small = engine(tiny_model, "snapkv", num_gpu_blocks_override=ENOUGH - 1, **LIMITS)
    with pytest.raises(ValueError, match=r"max seq len|max_model_len"), too_small:
        pass


def test_a_request_that_the_whole_pool_could_not_evict_is_served_without(tiny_model: Path, tmp_path: Path) -> None:
    reference = ReferenceLlama(tiny_model)
    prompts = random_prompts((1000, 1023, 400, 1000), seed=9)
    # Of 1,000 tokens nine tenths are 28 blocks, and 31 + 1 + 28 are more than the pool has.
    extra = [{"kv_eviction_keep": 0.9}, None, {"kv_eviction_keep": 0.5}, None]
    with engine(tiny_model, "snapkv", num_gpu_blocks_override=ENOUGH, audit=str(tmp_path), **LIMITS) as llm:
        answers = generate(llm, prompts, 8, extra_args=extra)
        assert metrics_of(llm)["vllm:kv_eviction_requests"] >= 2
        assert_all_returned(llm)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        evicted = list(tmp_path.glob(f"{answer.request_id}-*"))
        assert bool(evicted) == (i != 0)
        kept = audit_of(tmp_path, answer.request_id).mask() if evicted else None
        expected = decode_logprobs(reference, prompt, answer.tokens, kept)
        assert float((answer.logprobs - expected).abs().max()) <= 3e-4  # see test_memory.py

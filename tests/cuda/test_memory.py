"""What is set aside beside the KV cache."""

from __future__ import annotations

from vllm_defensive.worker.cuda.worker import memory_beside_cache

LLAMA_8B = {"num_layers": 32, "num_query_heads": 32, "num_kv_heads": 8, "head_size": 128, "window_bytes": 64}


def test_memory_grows_with_the_longest_prompt_and_stays_small_beside_a_gpu() -> None:
    short = memory_beside_cache(**LLAMA_8B, max_tokens=8192, max_requests=256, prompts_at_once=32)
    long = memory_beside_cache(**LLAMA_8B, max_tokens=131072, max_requests=256, prompts_at_once=32)
    # 32 windows of 8 MiB; partial results of 256 decode rows; 8 copies of 256 heads' scores, and 16
    # of those that are weighed at a time, which are all of a short prompt's
    assert short == 32 * 2**23 + 256 * 16 * 32 * 129 * 4 + (8 + 16) * 256 * 8192 * 4
    assert short < 0.6 * 2**30 < long < 2 * 2**30

"""Sampled answers with a seed: the same draws for any chunks, at a boundary, and after a request was thrown out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import assert_all_returned, engine, metrics_of, random_prompts

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

LENGTHS = (700, 333, 90, 260)
PROMPTS = random_prompts(LENGTHS, seed=12)
TOKENS = 24


def draw(llm: Any, prompts: Sequence[list[int]], num_tokens: int = TOKENS, **own: Any) -> list[list[int]]:
    """Sampled answers of exactly `num_tokens` tokens; each request has a seed. own: fields of each."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=1, max_tokens=num_tokens, ignore_eos=True, seed=i, extra_args=own)
        for i in range(len(prompts))
    ]
    tokens = [{"prompt_token_ids": p} for p in prompts]
    return [list(o.outputs[0].token_ids) for o in llm.generate(tokens, params, use_tqdm=False)]


def test_draws_do_not_depend_on_chunks(tiny_model: Path) -> None:
    cases: tuple[dict[str, Any], ...] = ({}, {"kv_eviction_boundary": 70})
    found = []
    for budget in (2048, 128, 48):
        # In float32, in which other batches' rounding does not reach the draw.
        with engine(tiny_model, "snapkv", dtype="float32", max_num_batched_tokens=budget) as llm:
            found.append([draw(llm, PROMPTS, **own) for own in cases])
            assert_all_returned(llm)
    assert found[0] == found[1] == found[2]
    assert len({tuple(answer) for case in found[0] for answer in case}) > len(PROMPTS), "seeds and contexts tell"


def test_draws_go_on_where_they_were_after_a_request_was_thrown_out(tiny_model: Path) -> None:
    prompts, own = random_prompts([260] * 6, seed=9), {"kv_eviction_keep": 0.4}
    settings = {"dtype": "float32", "min_tokens": 64, "max_num_batched_tokens": 200}
    with engine(tiny_model, "snapkv", **settings) as roomy:
        expected = draw(roomy, prompts, 180, **own)
        assert metrics_of(roomy)["vllm:num_preemptions"] == 0
    with engine(tiny_model, "snapkv", max_model_len=512, num_gpu_blocks_override=26, **settings) as tight:
        assert draw(tight, prompts, 180, **own) == expected
        assert metrics_of(tight)["vllm:num_preemptions"] > 0
        assert_all_returned(tight)

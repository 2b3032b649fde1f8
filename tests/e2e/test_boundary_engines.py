"""What is kept at a boundary depends neither on chunks and company nor on having been thrown out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.engines import (
    assert_all_returned,
    audit_of,
    engine,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
)
from tests.e2e.test_boundary import CASES, FLOAT_NOISE, PROMPTS, fields

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def test_chunks_and_company_do_not_change_what_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    own = fields(kv_eviction="layer-defensivekv", kv_eviction_keep=0.3)
    here, there = tmp_path / "together", tmp_path / "alone"
    settings = {"per_request": True, "dtype": "float32", "reuse": "off"}
    with engine(tiny_model, "none", audit=str(here), max_num_batched_tokens=200, **settings) as llm:
        together = generate(llm, PROMPTS, 8, own)
    with engine(tiny_model, "none", audit=str(there), **settings) as llm:
        alone = [generate(llm, [prompt], 8, [extra])[0] for prompt, extra in zip(PROMPTS, own, strict=True)]
    for (_, boundary), a, b in zip(CASES, together, alone, strict=True):
        if boundary == 20:
            continue
        ours, theirs = audit_of(here, a.request_id).mask(), audit_of(there, b.request_id).mask()
        # Scores differ by float noise only, which can swap tokens (and so pages) at the border.
        assert float((ours != theirs).float().mean()) <= 0.01


def test_thrown_out_requests_are_evicted_at_their_boundary_again(tiny_model: Path, tmp_path: Path) -> None:
    own = [{"kv_eviction_boundary": 200, "kv_eviction_keep": 0.4}] * 6
    prompts, common = random_prompts([260] * 6, seed=9), {"dtype": "float32", "min_tokens": 64, "reuse": "off"}
    with engine(tiny_model, "snapkv", **common) as roomy:
        expected = generate(roomy, prompts, 120, own)
        assert metrics_of(roomy)["vllm:num_preemptions"] == 0
    small = {"max_model_len": 512, "num_gpu_blocks_override": 26, "audit": str(tmp_path)}
    with engine(tiny_model, "snapkv", **common, **small) as tight:
        answers = generate(tight, prompts, 120, own)
        assert metrics_of(tight)["vllm:num_preemptions"] > 0
        assert largest_difference(answers, expected) <= FLOAT_NOISE
        assert all(audit_of(tmp_path, a.request_id).stop == 200 for a in answers)
        assert_all_returned(tight)


def test_a_stock_engine_after_one_with_eviction_leaves_fields_alone(tiny_model: Path) -> None:
    """vLLM knows no such fields and ignores them; what another engine of the process takes is not its concern."""
    from vllm.exceptions import VLLMValidationError

    prompt, wrong = random_prompts([40]), [{"kv_eviction_keep": 7}]
    with engine(tiny_model, "snapkv") as llm, pytest.raises(VLLMValidationError, match="kv_eviction_keep=7"):
        generate(llm, prompt, 1, wrong)
    with engine(tiny_model) as llm:
        assert len(generate(llm, prompt, 1, wrong)[0].tokens) == 1

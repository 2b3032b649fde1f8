"""Requests that are evicted when their memory is wanted: as long as it is not, answers are those of stock vLLM;
and later what a model answers that cannot see what is gone, from when it is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engines import (
    MIXED,
    assert_all_returned,
    audit_of,
    audits_of,
    engine,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    scheduler_of,
)
from tests.learned_scores import score_of
from tests.reference_model import ReferenceLlama, decode_logprobs

pytestmark = pytest.mark.e2e

FULL: dict[str, Any] = {"when": "full", "keep": 0.2}
# Most end with a block: nothing is behind what they are packed from again.
PROMPTS = random_prompts((320, 517, 416, 352, 320))
TOKENS = 150
ROUNDING = 1e-4  # a few hundred float32 roundings of logits up to 16


def small(blocks: int) -> dict[str, Any]:
    return {"num_gpu_blocks_override": blocks + 1, "max_model_len": 1024, "dtype": "float32"}


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_with_memory_enough_answers_are_those_of_stock(tiny_model: Path, asynchronous: bool) -> None:
    """To the bit, in a mixed batch, the second time from the prefix cache."""
    prompts = random_prompts(MIXED)
    arguments: dict[str, Any] = {"dtype": "float32", "asynchronous": asynchronous}
    with engine(tiny_model, **arguments) as llm:
        expected = [generate(llm, prompts, 24) for _ in range(2)]
    with engine(tiny_model, "streamingllm", **arguments, **FULL) as llm:
        for turn in range(2):
            answers = generate(llm, prompts, 24)
            assert largest_difference(answers, expected[turn]) == 0
            assert [a.cached_tokens for a in answers] == [a.cached_tokens for a in expected[turn]]
        metrics = metrics_of(llm)
        assert metrics["vllm:kv_eviction_requests"] == metrics["vllm:kv_eviction_late"] == 0
        assert_all_returned(llm)


@pytest.mark.parametrize(
    "policy, settings",
    [
        ("halokv", {}),
        ("learnedkv", {}),
        pytest.param("learned-halokv", {}, marks=pytest.mark.slow),
        pytest.param("streamingllm", {"asynchronous": True}, marks=pytest.mark.slow),
        pytest.param("random", {"answers": "evict", "interval": 64}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_in_a_full_pool_answers_equal_the_masked_reference(
    tiny_model: Path, tmp_path: Path, policy: str, settings: dict[str, Any]
) -> None:
    """Five that need 76 blocks in 50; nobody is thrown out."""
    reference, folder = ReferenceLlama(tiny_model), tmp_path / "audits"
    if "learned" in policy:
        score_of(reference, tiny_model, tmp_path / "score.safetensors")
        settings = {**settings, "learned": str(tmp_path / "score.safetensors")}
    with engine(tiny_model, policy, audit=str(folder), **small(50), **FULL, **settings) as llm:
        answers = generate(llm, PROMPTS, TOKENS)
        metrics, totals = metrics_of(llm), scheduler_of(llm).eviction_manager.lifecycle.totals
        assert metrics["vllm:num_preemptions"] == 0 and totals.late == totals.requests + totals.repeats > 3
        assert (totals.repeats > 0) == (policy not in ("halokv", "learned-halokv"))
        assert_all_returned(llm)
    events = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        audits = audits_of(folder, answer.request_id)
        seen = [(a.first_reader, a.mask()) for a in audits]
        assert all(reader >= len(prompt) for reader, _ in seen), "it was whole while it was read"
        expected = decode_logprobs(reference, prompt, answer.tokens, None, again=seen)
        assert float((answer.logprobs - expected).abs().max()) <= ROUNDING
        if seen:
            without = decode_logprobs(reference, prompt, answer.tokens, None, again=seen[:-1])
            assert float((answer.logprobs - without).abs().max()) > 0.01
        events += len(seen)
    assert events == totals.late


def test_what_is_kept_late_is_what_is_kept_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """By the window of the prompt's end, though the answer has gone on."""
    kept = {}
    for when, blocks in (("always", 90), ("full", 50)):
        folder = tmp_path / when
        with engine(tiny_model, "halokv", audit=str(folder), when=when, keep=0.2, **small(blocks)) as llm:
            answers = generate(llm, PROMPTS, TOKENS)
            kept[when] = {
                i: audit_of(folder, a.request_id) for i, a in enumerate(answers) if audits_of(folder, a.request_id)
            }
    assert len(kept["full"]) > 2
    for i, audit in kept["full"].items():
        assert audit.stop == len(PROMPTS[i]) and torch.equal(audit.mask(), kept["always"][i].mask())

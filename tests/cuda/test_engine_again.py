"""Answers that are evicted as well: what is packed, and what lies behind, is chosen from again while a request generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cuda.engines import engine
from tests.e2e.engines import (
    Answer,
    assert_all_returned,
    audits_of,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.learned_scores import score_of
from tests.reference_model import ReferenceLlama, decode_logprobs

pytestmark = pytest.mark.e2e
REFERENCE = pytest.mark.parametrize("kernels", ["reference"], indirect=True)
FLOAT32 = 1e-4  # a few hundred float32 roundings of logits up to 16
PROMPTS = random_prompts((100, 20, 129), seed=3)
TOKENS = 150


def test_x(model, tmp_path, monkeypatch, kernel_calls):
    pass


@REFERENCE
def test_keeping_all_of_an_answer_equals_stock(model: Path, kernels: str, kernel_calls: dict[str, int]) -> None:
    with engine(model, dtype="float32") as llm:
        expected = generate(llm, PROMPTS, TOKENS)
    with engine(model, "keep-all", dtype="float32", answers="evict", interval=64, enable_prefix_caching=False) as llm:
        assert "Async" in type(scheduler_of(llm)).__name__
        answers = generate(llm, PROMPTS, TOKENS)
        assert largest_difference(answers, expected) <= FLOAT32
        assert_all_returned(llm)
        assert not worker_of(llm)._evictor._kept
    assert kernel_calls["compact"] == 8


@REFERENCE
@pytest.mark.parametrize("policy", ["random", "streamingllm", "learnedkv", "learned-halokv", "random-uneven"])
def test_answers_follow_the_plain_model(model: Path, tmp_path: Path, kernels: str, policy: str) -> None:
    reference = ReferenceLlama(model)
    extra: dict[str, Any] = {}
    if "learned" in policy:
        score_of(reference, model, tmp_path / "score")
        extra["learned"] = str(tmp_path / "score")
    shape = {"dtype": "float32", "audit": str(tmp_path), "policies": [policy], **extra}
    with engine(model, policy, answers="evict", interval=48, budget=64, **shape) as llm:
        answers = generate(llm, PROMPTS, TOKENS)
        assert_all_returned(llm)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        events = audits_of(tmp_path, answer.request_id)
        masks = [event.mask() for event in events]
        print(policy, len(prompt), [(e.stop, e.repeat, e.packed_blocks, e.kept_counts.tolist()) for e in events])
        want = decode_logprobs(reference, prompt, answer.tokens, masks[0], again=masks[1:])
        print((answer.logprobs - want).abs().max())

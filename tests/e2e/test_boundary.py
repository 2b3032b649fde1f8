"""Eviction at a boundary inside the prompt: the rest of the prompt sees what was kept, and is kept whole.

One engine for all tests; `test_boundary_engines.py` has those that compare engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import (
    assert_all_returned,
    audit_of,
    engine,
    generate,
    largest_difference,
    random_prompts,
)
from tests.reference_model import ReferenceLlama, decode_logprobs

pytestmark = pytest.mark.e2e

# (prompt, boundary): at a block's end, inside one, one token before the end, the end itself, none, too short to evict.
CASES = ((700, 512), (601, 333), (400, 399), (320, 320), (450, None), (90, 20), (1100, 96))
PROMPTS = random_prompts([length for length, _ in CASES], seed=5)
FLOAT_NOISE = 2e-4  # a few hundred float32 roundings of logits up to 16


def fields(**own: Any) -> list[dict[str, Any]]:
    return [{**own, **({} if b is None else {"kv_eviction_boundary": b})} for _, b in CASES]


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boundary")


@pytest.fixture(scope="module")
def llm(tiny_model: Path, audits: Path) -> Iterator[Any]:
    """Chunks of 200 tokens, so that windows are spread over chunks and chunks end at boundaries. Nothing outlives its
    request, so that these are to the token."""
    settings = {"per_request": True, "reuse": "off", "audit": str(audits), "max_num_batched_tokens": 200}
    with engine(tiny_model, "none", dtype="float32", **settings) as llm:
        yield llm


def test_keeping_everything_at_a_boundary_changes_nothing(llm: Any) -> None:
    plain = generate(llm, PROMPTS, 24)
    for turn in range(2):
        kept = generate(llm, PROMPTS, 24, fields(kv_eviction="keep-all"))
        assert largest_difference(kept, plain) <= FLOAT_NOISE
        if turn:
            hits = [answer.cached_tokens for answer in kept]
            # Whole blocks that leave a window of 32 before the boundary.
            assert hits[:4] == [480, 288, 352, 288]
    assert_all_returned(llm)


@pytest.mark.parametrize("policy", ["random-uneven", "layer-defensivekv", "snapkv"])
def test_rest_of_the_prompt_and_answer_see_what_was_kept(llm: Any, tiny_model: Path, audits: Path, policy: str) -> None:
    reference = ReferenceLlama(tiny_model)
    answers = generate(llm, PROMPTS, 24, fields(kv_eviction=policy, kv_eviction_keep=0.3))
    differs = 0.0
    for (length, boundary), prompt, answer in zip(CASES, PROMPTS, answers, strict=True):
        if boundary == 20:
            assert not list(audits.glob(f"{answer.request_id}-*"))
            continue
        audit = audit_of(audits, answer.request_id)
        assert audit.stop == (boundary or length) and audit.policy == policy
        expected = decode_logprobs(reference, prompt, answer.tokens, audit.mask())
        assert float((answer.logprobs - expected).abs().max()) <= FLOAT_NOISE
        full = decode_logprobs(reference, prompt, answer.tokens, None)
        differs = max(differs, float((expected - full).abs().max()))
    assert differs > 0.1  # else the comparison could not fail
    assert_all_returned(llm)


def test_protected_tokens_stay_whole(llm: Any, audits: Path) -> None:
    (answer,) = generate(llm, PROMPTS[:1], 8, [{"kv_eviction": "random-uneven", "kv_eviction_protect": 100}])
    audit = audit_of(audits, answer.request_id)
    assert audit.shared_blocks == 4  # 100 tokens lie in 4 blocks of 32
    assert bool(audit.mask()[:, :, :128].all()) and not bool(audit.mask()[:, :, 128:].all())


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("kv_eviction", "best", "choose one of none, auto, random, streamingllm"),
        ("kv_eviction_keep", 0, "(0, 1]"),
        ("kv_eviction_keep", "much", "(0, 1]"),
        ("kv_eviction_boundary", 701, "the prompt has 700 tokens"),
        ("kv_eviction_boundary", 1.5, "a whole number"),
        ("kv_eviction_protect", -1, "0 or more"),
        ("kv_eviction_windw", 3, "unknown, choose from kv_eviction"),
    ],
)
def test_wrong_fields_are_refused_before_the_engine_sees_them(llm: Any, field: str, value: Any, allowed: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as error:
        generate(llm, PROMPTS[:1], 1, [{field: value}])
    assert f"{field}={value!r}" in str(error.value) and allowed in str(error.value)
    assert len(generate(llm, PROMPTS[:1], 1)[0].tokens) == 1

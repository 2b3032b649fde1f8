"""An evicted hybrid answers as a plain model that cannot see the evicted entries of its global layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import Answer, assert_all_returned, audit_of, engine, generate, metrics_of, random_prompts
from tests.masked_transformer import MaskedTransformer

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

# Beyond the sliding window of 128, within and over one chunk of 512, with and without a tail block.
PROMPTS = random_prompts((300, 601, 160, 1000), seed=6)
# A few hundred float32 roundings of logits up to 16, through six layers; un-evicted requests are off by up to 5e-5.
FLOAT_NOISE = 2e-4


@pytest.fixture(scope="module")
def reference(tiny_gemma3: Path) -> MaskedTransformer:
    return MaskedTransformer(tiny_gemma3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def llm(tiny_gemma3: Path, folder: Path) -> Iterator[Any]:
    with engine(tiny_gemma3, "snapkv", keep=0.3, dtype="float32", audit=str(folder), reuse="off") as llm:
        yield llm
        assert_all_returned(llm)


def assert_equal_to_masked(
    reference: MaskedTransformer,
    folder: Path,
    prompts: Sequence[list[int]],
    answers: Sequence[Answer],
    noise: float = FLOAT_NOISE,
    least_effect: float = 0.5,
) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        kept = audit_of(folder, answer.request_id).mask()
        masked, full = (reference.answer_logprobs(prompt, answer.tokens, mask) for mask in (kept, None))
        error, effect = (float((answer.logprobs - expected).abs().max()) for expected in (masked, full))
        print(f"{len(prompt)} tokens: {error:.1e} from the masked reference, {effect:.2f} from the full one")
        assert error <= noise
        assert effect > least_effect, "else the comparison could not fail"


def test_an_unevicted_request_equals_the_full_reference(llm: Any, reference: MaskedTransformer) -> None:
    answers = generate(llm, PROMPTS, 12, [{"kv_eviction": "none"}] * len(PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = reference.answer_logprobs(prompt, answer.tokens, None)
        assert float((answer.logprobs - expected).abs().max()) <= FLOAT_NOISE


@pytest.mark.parametrize("policy", ["snapkv", "layer-defensivekv", "random-uneven"])
def test_answers_equal_the_masked_reference(llm: Any, reference: MaskedTransformer, folder: Path, policy: str) -> None:
    assert llm.reset_prefix_cache()
    answers = generate(llm, PROMPTS, 12, [{"kv_eviction": policy}] * len(PROMPTS))
    assert not any(answer.cached_tokens for answer in answers)
    assert_equal_to_masked(reference, folder, PROMPTS, answers)


def test_a_next_turn_hits_the_originals_and_is_evicted_as_a_whole(
    llm: Any, reference: MaskedTransformer, folder: Path
) -> None:
    first = generate(llm, PROMPTS, 12)
    questions = random_prompts([60] * len(PROMPTS), seed=7)
    turns = [p + a.tokens + q for p, a, q in zip(PROMPTS, first, questions, strict=True)]
    second = generate(llm, turns, 12)
    for prompt, turn, answer in zip(PROMPTS, turns, second, strict=True):
        assert answer.cached_tokens >= (len(prompt) - 1) // 32 * 32
        assert audit_of(folder, answer.request_id).stop == len(turn)
    assert_equal_to_masked(reference, folder, turns, second)


@pytest.mark.parametrize("boundary", [140, 96])
def test_after_a_boundary_the_rest_of_the_prompt_sees_what_was_kept(
    llm: Any, reference: MaskedTransformer, folder: Path, boundary: int
) -> None:
    """Of 96 tokens all are inside the sliding window, which must not lose them; a second time they are cached."""
    fields = {"kv_eviction": "layer-defensivekv", "kv_eviction_boundary": boundary, "kv_eviction_keep": 0.4}
    for _ in range(2):
        answers = generate(llm, PROMPTS, 12, [fields] * len(PROMPTS))
        assert all(audit_of(folder, answer.request_id).stop == boundary for answer in answers)
        assert_equal_to_masked(reference, folder, PROMPTS, answers)


def test_thrown_out_requests_equal_the_masked_reference(
    tiny_gemma3: Path, reference: MaskedTransformer, tmp_path: Path
) -> None:
    """Evicted at the end of their prompts, then at a boundary; six together outgrow the pool while they answer."""
    prompts = random_prompts([170] * 6, seed=9)
    small = {"max_model_len": 384, "num_gpu_blocks_override": 60, "audit": str(tmp_path), "reuse": "off"}
    with engine(tiny_gemma3, "snapkv", keep=0.4, dtype="float32", **small) as llm:
        before = 0.0
        for fields, evicted_at in (({}, 170), ({"kv_eviction_boundary": 130}, 130)):
            answers = generate(llm, prompts, 120, [fields] * len(prompts))
            preemptions = metrics_of(llm)["vllm:num_preemptions"]
            assert preemptions > before
            before = preemptions
            assert all(audit_of(tmp_path, answer.request_id).stop == evicted_at for answer in answers)
            assert_equal_to_masked(reference, tmp_path, prompts, answers)
            assert_all_returned(llm)

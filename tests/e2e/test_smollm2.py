"""A real model: what holds on random weights holds there too."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.e2e.engines import (
    Answer,
    assert_all_returned,
    audit_of,
    engine,
    generate,
    largest_difference,
)
from tests.reference_model import ReferenceLlama, decode_logprobs
from vllm_defensive import learned

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FACTS = ("The harbour office opens at seven.", "Marta keeps the keys in the blue tin.", "Ferries leave on even days.")


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """Three documents of about 800, 350 and 100 tokens, each with a question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    filler = [f"On page {i} the clerk wrote that the {i % 7}th crate of oranges was counted twice. " for i in range(34)]
    texts = [
        "".join(filler[:count]) + FACTS[i] + "".join(filler[count:end])
        for i, (count, end) in enumerate(((16, 34), (6, 14), (1, 3)))
    ]
    conversations = [[{"role": "user", "content": f"{text}\n\nWho keeps the keys, and where?"}] for text in texts]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in conversations]


def run(
    smollm2: Path, prompts: list[list[int]], policy: str | None, num_tokens: int, **arguments: object
) -> list[Answer]:
    with engine(smollm2, policy, max_model_len=4096, **arguments) as llm:
        answers = generate(llm, prompts, num_tokens)
        assert_all_returned(llm)
    return answers


def test_its_learned_score_is_part_of_the_package(smollm2: Path) -> None:
    """Found by its weights, which `make model` converts to the same bytes everywhere."""
    found = learned.find(learned.fingerprint(str(smollm2)))
    assert found is not None and Path(found[0]).parent == learned.PACKAGED
    learned.check_shape(found[1], found[0], 30, 3, 64)
    assert found[1].facts.model == smollm2.name and found[1].facts.checks and found[1].facts.window_keep == 0.2


def test_keep_all_equals_stock(smollm2: Path, prompts: list[list[int]]) -> None:
    """In float32: in bf16 two tokens of equal logits may change places, and on some processors do."""
    stock = run(smollm2, prompts, None, 24, dtype="float32")
    ours = run(smollm2, prompts, "keep-all", 24, dtype="float32")
    difference = largest_difference(ours, stock)
    print(f"largest difference {difference:.2e}")
    assert difference <= 2e-4


@pytest.mark.timeout(600)
def test_answers_equal_the_masked_reference(smollm2: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    assert 650 < len(prompts[0]) < 1000
    reference = ReferenceLlama(smollm2)
    settings = {"keep": 0.2, "min_tokens": 200, "audit": str(tmp_path)}
    with engine(smollm2, "layer-defensivekv", dtype="float32", max_model_len=2048, **settings) as llm:
        # One after the other: beside a request that keeps the text whole, the others would leave it in place.
        (unevicted,) = generate(llm, prompts[:1], 16, extra_args=[{"kv_eviction": "none"}])
        evicted = generate(llm, prompts[:2], 16)
        assert_all_returned(llm)
    allowed = error(reference, prompts[0], unevicted, None)
    for prompt, answer in zip(prompts, evicted, strict=False):
        audit = audit_of(tmp_path, answer.request_id)
        assert audit.shared_blocks == 0 and audit.packed_blocks < 0.21 * audit.stop / 32 + 1
        masked, full = error(reference, prompt, answer, audit.mask()), error(reference, prompt, answer, None)
        print(f"{len(prompt)} tokens: {masked:.1e}, un-evicted {allowed:.1e}, against full attention {full:.1e}")
        assert masked <= 4 * allowed  # both are noise of float32; maxima of few samples vary
        assert full > 100 * masked


def error(reference: ReferenceLlama, prompt: list[int], answer: Answer, kept: Tensor | None) -> float:
    return float((answer.logprobs - decode_logprobs(reference, prompt, answer.tokens, kept)).abs().max())

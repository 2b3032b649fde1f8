"""Capped logits, attention sinks, layers that read the caches of others: as on CPUs, `tests/e2e` has the models."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny_model
from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.e2e.engines import (
    assert_all_returned,
    audit_of,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    worker_of,
)
from tests.masked_transformer import MaskedTransformer

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.e2e,
    pytest.mark.skipif(MODE != "pretend", reason="written for the attention of pretend.py"),
]

PROMPTS = random_prompts((40, 300, 257))  # the first one is decoding while the others are read
FLOAT_NOISE = 2e-4  # a few hundred float32 roundings of logits up to 16
FP16_STEP = 2**-7  # between numbers in [8, 16), where the largest logits are
KINDS = ("gemma2", "granite_swa", "gemma4_e")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # Gemma 4 imports the compiler, and that the passes, which ask for many more compiled operations by name.
    passes = SimpleNamespace(PostGradPassManager=object)
    monkeypatch.setitem(sys.modules, "vllm.compilation.passes.pass_manager", passes)
    return str(request.param)


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    return getattr(tiny_model, f"write_tiny_{kind}")(tmp_path / kind)


ARGUMENTS: dict[str, Any] = {"dtype": "float32", "attention_backend": "TRITON_ATTN"}


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_keep_all_equals_stock(folder: Path, kernels: str, kernel_calls: dict[str, int]) -> None:
    with engine(folder, **ARGUMENTS) as llm:
        expected = generate(llm, PROMPTS, 5)
    with engine(folder, "keep-all", **ARGUMENTS) as llm:
        for turn in range(2):
            answers = generate(llm, PROMPTS, 5)
            assert bool(sum(answer.cached_tokens for answer in answers)) == bool(turn)
            assert largest_difference(answers, expected) <= FLOAT_NOISE
        assert metrics_of(llm)["vllm:kv_eviction_requests"] == 6
        assert kernel_calls["ragged_paged_decode"] > 0
        assert_all_returned(llm)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_sinks_beside_flash_attention(tmp_path: Path, kernels: str) -> None:
    """Which rounds attention's weights where our kernel does not."""
    folder = tiny_model.write_tiny_granite_swa(tmp_path / "model")
    arguments = {"dtype": "float16", "attention_backend": "FLASH_ATTN"}
    with engine(folder, **arguments) as llm:
        expected = generate(llm, PROMPTS, 3)
    with engine(folder, "keep-all", **arguments) as llm:
        assert "Flash" in worker_of(llm)._attention_layers[0].get_attn_backend().__name__
        assert largest_difference(generate(llm, PROMPTS, 3), expected) <= 2 * FP16_STEP
        assert_all_returned(llm)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
@pytest.mark.parametrize("policy", ["layer-defensivekv", "tova", "echokv"])
def test_answers_equal_the_masked_reference(folder: Path, policy: str, kernels: str, tmp_path: Path) -> None:
    """By window scores of the kernels, by formulas that these do not have, and by a second look."""
    reference, audits = MaskedTransformer(folder), tmp_path / "audits"
    with engine(folder, policy, keep=0.3, audit=str(audits), reuse="off", **ARGUMENTS) as llm:
        answers = generate(llm, PROMPTS, 5)
        reserved = worker_of(llm)._beside_cache(list(worker_of(llm)._attention_names))
        readers = len(worker_of(llm)._evictor._readers)
        assert reserved.windows % (readers * 4 * 32) == 0
        assert_all_returned(llm)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        kept = None if len(prompt) == 40 else audit_of(audits, answer.request_id).mask()  # it has nothing to gain
        masked, full = (reference.answer_logprobs(prompt, answer.tokens, mask) for mask in (kept, None))
        assert float((answer.logprobs - masked).abs().max()) <= FLOAT_NOISE
        assert kept is None or float((masked - full).abs().max()) > 100 * FLOAT_NOISE, "else it could not fail"

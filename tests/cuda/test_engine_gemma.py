"""Models of Gemma's kind: layers with sliding windows beside those that are evicted, heads of 256, and images within
which queries look ahead."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.e2e.engines import (
    Answer,
    assert_all_returned,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    worker_of,
)
from tests.tiny_model import write_tiny_gemma3, write_tiny_gemma4

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.e2e,
    pytest.mark.skipif(MODE != "pretend", reason="written for the attention of pretend.py"),
]

PROMPTS = random_prompts((40, 300, 257))  # the first one is decoding while the others are read
# First and last token of each image, by the prompt's length. A chunk has all of it, as where vLLM schedules images.
IMAGES = {300: [(160, 230)], 257: [(60, 120), (130, 200)]}
ARGUMENTS: dict[str, Any] = {"dtype": "float32", "attention_backend": "TRITON_ATTN", "max_num_batched_tokens": 192}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma3(tmp_path_factory.mktemp("gemma") / "tiny-gemma3", head_size=256)


def answers_with_images(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """vLLM is told that prompts hold images, which its runner works out of what a vision model was given."""
    from vllm.v1.worker.gpu.model_states import default

    original, lengths = default.build_attn_metadata, worker_of(llm).model_runner.req_states.prompt_len.np

    def build_attn_metadata(*args: Any, **kwargs: Any) -> Any:
        spans = {row: IMAGES.get(length, []) for row, length in enumerate(lengths[kwargs["req_idx"]].tolist())}
        return original(*args, **{**kwargs, "mm_req_doc_ranges": spans})

    with monkeypatch.context() as patches:
        patches.setattr(default, "build_attn_metadata", build_attn_metadata)
        return generate(llm, PROMPTS, 5)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_keep_all_equals_stock_with_images(gemma: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that decode go first, so that those with images are others than the batch says."""
    arguments = {**ARGUMENTS, "enable_prefix_caching": False}
    with engine(gemma, **arguments) as llm:
        plain = generate(llm, PROMPTS, 5)
        expected = answers_with_images(llm, monkeypatch)
    first = [abs(float(a.logprobs[0] - b.logprobs[0])) for a, b in zip(expected, plain, strict=True)]
    assert first[0] <= 1e-4 < 0.01 < min(first[1:])  # images matter where they are, so the test can fail
    with engine(gemma, "keep-all", **arguments) as llm:
        answers = answers_with_images(llm, monkeypatch)
        assert metrics_of(llm)["vllm:kv_eviction_requests"] == 3
        assert_all_returned(llm)
    assert largest_difference(answers, expected) <= 1e-4  # a few hundred float32 roundings of logits up to 16


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_gemma4_with_pages_of_its_own_length(tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes the global layers' blocks twice as long, so that all layers' blocks are as many bytes."""
    # The model imports the compiler, and that the passes, which ask for many more compiled operations by name.
    passes = SimpleNamespace(PostGradPassManager=object)
    monkeypatch.setitem(sys.modules, "vllm.compilation.passes.pass_manager", passes)
    model = write_tiny_gemma4(tmp_path / "tiny-gemma4")
    arguments = {**ARGUMENTS, "max_num_batched_tokens": 128}
    with engine(model, **arguments) as llm:
        expected = generate(llm, PROMPTS, 5)
    with engine(model, "keep-all", **arguments) as llm:
        assert (llm.llm_engine.vllm_config.cache_config.block_size, page_tokens(llm)) == (16, 32)
        answers = generate(llm, PROMPTS, 5)
        assert metrics_of(llm)["vllm:kv_eviction_requests"] == 3
        assert_all_returned(llm)
        reserved = worker_of(llm)._beside_cache(worker_of(llm)._evictor._projections._names)
        assert reserved.windows % (2 * 4 * 64) == 0  # queries of the global layers, two, and of their heads' size
    assert largest_difference(answers, expected) <= 1e-4


def page_tokens(llm: Any) -> int:
    return int(worker_of(llm)._runtime.pages.page_tokens)

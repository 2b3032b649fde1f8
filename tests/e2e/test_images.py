"""Prompts with images (Qwen2-VL, whose positions have three parts): whole, chunked through an image, from the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.engines import (
    Answer,
    answer_of,
    assert_all_returned,
    audit_of,
    engine,
    largest_difference,
    metrics_of,
    random_prompts,
)
from tests.tiny_model import write_tiny_qwen2_vl

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SIZES = ((224, 168), (280, 140))  # pixels: 8 x 6 and 10 x 5 tokens
BEFORE, BETWEEN = random_prompts((200, 150), seed=3)
IMAGE = (201, 249)  # where the first of them is in each prompt
OWN = ({}, {}, {"kv_eviction_boundary": IMAGE[1]})
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 220,  # so that the first chunk of the first prompt ends inside its image
    "limit_mm_per_prompt": {"image": 2, "video": 0},
}
FLOAT_NOISE = 1e-4  # a few hundred float32 roundings of logits up to 16


def prompts(llm: Any) -> list[dict[str, Any]]:
    """A question about one image, and twice one about two."""
    from PIL import Image

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]
    names = ("vision_start", "image_pad", "vision_end")
    image = [llm.get_tokenizer().convert_tokens_to_ids(f"<|{name}|>") for name in names]
    one, two = BEFORE + image + BETWEEN, BEFORE + image + BETWEEN + image + BEFORE
    return [
        {"prompt_token_ids": tokens, "multi_modal_data": {"image": images[:count]}}
        for tokens, count in ((one, 1), (two, 2), (two, 2))
    ]


def ask(llm: Any, policy: str, which: Sequence[int] = (0, 1, 2)) -> list[Answer]:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, logprobs=1, extra_args={**OWN[i], "kv_eviction": policy}
        )
        for i in which
    ]
    asked = prompts(llm)
    return [answer_of(o) for o in llm.generate([asked[i] for i in which], params, use_tqdm=False)]


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audits")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torchvision", reason="vLLM's Qwen2-VL imports torchvision")
    return write_tiny_qwen2_vl(tmp_path_factory.mktemp("qwen2-vl"))


@pytest.fixture(scope="module")
def stock(model: Path) -> list[Answer]:
    with engine(model, **COMMON) as llm:
        return ask(llm, "none")


@pytest.fixture(scope="module")
def llm(model: Path, audits: Path, stock: list[Answer]) -> Iterator[Any]:
    """stock: its engine has to go first."""
    with engine(model, "layer-defensivekv", keep=0.3, audit=str(audits), reuse="off", **COMMON) as llm:
        yield llm


def test_keeping_everything_equals_stock(llm: Any, stock: list[Answer]) -> None:
    for turn in range(2):
        answers = ask(llm, "keep-all")
        assert largest_difference(answers, stock) <= FLOAT_NOISE
        # Whole blocks that leave a window of 32 before the end, or the boundary.
        assert not turn or [answer.cached_tokens for answer in answers] == [352, 608, 192]
    assert metrics_of(llm)["vllm:kv_eviction_requests"] == 6
    assert_all_returned(llm)


def test_what_is_kept_depends_on_neither_chunks_nor_company(llm: Any, audits: Path, stock: list[Answer]) -> None:
    together = ask(llm, "layer-defensivekv")
    assert_all_returned(llm)
    alone = [ask(llm, "layer-defensivekv", [i])[0] for i in range(3)]
    assert_all_returned(llm)
    for ours, theirs, length, whole in zip(together, alone, (400, 652, IMAGE[1]), stock, strict=True):
        a, b = audit_of(audits, ours.request_id), audit_of(audits, theirs.request_id)
        assert a.stop == length and 0.2 < float(a.mask().float().mean()) < 0.6
        # Scores differ by float noise only, which can swap tokens (and so pages) at the border.
        assert float((a.mask() != b.mask()).float().mean()) <= 0.01
        assert ours.tokens != whole.tokens, "what was dropped tells"


def test_a_boundary_inside_an_image_is_refused(llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"kv_eviction_boundary=230: .*choose 201 or 249"):
        llm.generate(prompts(llm)[:1], SamplingParams(extra_args={"kv_eviction_boundary": 230}), use_tqdm=False)

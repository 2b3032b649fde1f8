"""Where a boundary may lie among the images of a prompt: what a request is told before the engine sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_defensive import platforms
from vllm_defensive.compat.serving import _placeholders
from vllm_defensive.serving import checks

PLACES = {"image": [SimpleNamespace(offset=10, length=20), SimpleNamespace(offset=50, length=20)]}


def check(boundary: int, looks_ahead: bool, places: Any = None) -> None:
    """A prompt of 90 tokens with two images, on an engine whose model looks ahead within images, or not."""
    vllm_config: Any = SimpleNamespace(
        additional_config={"kv_eviction": {"policy": "snapkv"}},
        model_config=SimpleNamespace(is_mm_prefix_lm=looks_ahead),
    )
    prompt = {"prompt_token_ids": [1] * 90, "mm_placeholders": PLACES if places is None else places}
    checks.check_request(vllm_config, prompt, SimpleNamespace(extra_args={"kv_eviction_boundary": boundary}))


@pytest.fixture(params=["cpu", "cuda"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(checks, "current", lambda: platforms.PLATFORMS[request.param])
    return str(request.param)


def test_no_image_is_cut(platform: str) -> None:
    for boundary in (30, 49, 50, 70, 90):
        check(boundary, looks_ahead=False)
    with pytest.raises(VLLMValidationError, match=r"kv_eviction_boundary=51: inside an image.* choose 50 or 70"):
        check(51, looks_ahead=False)


def test_where_images_are_looked_at_as_a_whole_none_comes_behind_the_boundary(platform: str) -> None:
    """On a GPU: vLLM's CPU attention looks back only, whatever the model."""
    check(70, looks_ahead=True)
    check(40, looks_ahead=True, places={})
    if platform == "cpu":
        check(40, looks_ahead=True)
    else:
        for boundary in (5, 40, 50):
            with pytest.raises(VLLMValidationError, match=f"kv_eviction_boundary={boundary}: .*; put images first"):
                check(boundary, looks_ahead=True)


def test_the_engine_is_asked_about_what_generators_were() -> None:
    features = [SimpleNamespace(modality="image", mm_position=place) for place in PLACES["image"]]
    assert _placeholders(features) == PLACES
    assert _placeholders(None) == {}

"""What a request is told before the engine sees it: of a boundary among images, of fields that nobody would read."""

from __future__ import annotations

import asyncio
import json
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


class Raw:
    """As much of an HTTP request as is looked at."""

    def __init__(self, body: Any) -> None:
        self.content, self.parsed = json.dumps(body).encode(), 0

    async def body(self) -> bytes:
        return self.content

    async def json(self) -> Any:
        self.parsed += 1
        return json.loads(self.content)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def post(body: dict[str, Any], over_http: bool = True, additional: Any = None) -> Raw:
    """Through vLLM's own protocol; without HTTP as a line of `vllm run-batch`."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    raw = Raw(body)
    vllm_config = SimpleNamespace(additional_config={"kv_eviction": {"policy": "snapkv"}, **(additional or {})})
    request = ChatCompletionRequest(**body)
    asyncio.run(checks.check_body(vllm_config, request, raw if over_http else None))
    return raw


@pytest.mark.parametrize("over_http", [True, False])
@pytest.mark.parametrize("name", ["kv_eviction_keep", "kv-eviction-keep", "KV_Eviction"])
def test_a_field_beside_vllm_xargs_is_refused_and_sent_there(name: str, over_http: bool) -> None:
    """vLLM takes any name there, and passes over it."""
    post({**CHAT, "vllm_xargs": {"kv_eviction_keep": 0.5}}, over_http)
    with pytest.raises(VLLMValidationError, match=rf"^{name}=0.5: has no effect here; put it into vllm_xargs"):
        post({**CHAT, name: 0.5}, over_http)


def test_a_stock_engine_passes_over_such_fields_as_ever() -> None:
    post({**CHAT, "kv_eviction_keep": 0.5}, additional={"kv_eviction": None})


def test_a_body_that_does_not_mention_us_is_not_parsed_again() -> None:
    assert post(CHAT).parsed == 0
    assert post({**CHAT, "messages": [{"role": "user", "content": "an eviction notice"}]}).parsed == 1

"""Fields of requests that are evicted when memory is short: what they inherit, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.settings.test_repeats import settings
from vllm_defensive.settings import engine as config
from vllm_defensive.settings.request import RequestFieldError, resolve

FULL = {"policy": "snapkv", "when": "full"}


@pytest.mark.parametrize(
    "server, own, expected",
    [
        (FULL, {}, {"when": "full", "policy": "snapkv", "reuse": "off", "widths": "16", "answers": "keep"}),
        (FULL, {"when": "always"}, {"when": "always", "reuse": "boundary"}),
        (FULL, {"policy": "none"}, {"policy": "none", "when": "always"}),
        (FULL, {"boundary": 300}, {"when": "full", "boundary": 300, "reuse": "off"}),
        # What cannot be evicted then is evicted as it is read, unless the request asks for it.
        (FULL, {"policy": "kvzip"}, {"policy": "kvzip", "when": "always", "reuse": "boundary"}),
        (FULL, {"prompts": "bounded"}, {"prompts": "bounded", "when": "always"}),
        (FULL, {"widths": "8,4"}, {"widths": "8,4", "when": "always"}),
        ({"policy": "snapkv"}, {"when": "full"}, {"when": "full", "policy": "snapkv", "reuse": "off"}),
        ({"policy": "random"}, {"when": "full", "answers": "evict"}, {"when": "full", "answers": "evict"}),
        # Answers are given back by scores that last, and so are prompts on GPUs.
        ({"policy": "learned-halokv", "learned": "f"}, {"when": "full"}, {"policy": "learned-halokv"}),
        (
            {"policy": "learned-halokv", "learned": "f"},
            {"when": "full", "answers": "evict"},
            {"policy": "learnedkv", "when": "full"},
        ),
        (
            {"policy": "learned-halokv", "learned": "f", "repeats": "lasting"},
            {"when": "full"},
            {"policy": "learnedkv", "when": "full"},
        ),
        ({"policy": "auto", "when": "full"}, {"boundary": 300}, {"policy": "halokv", "when": "full"}),
        ({"policy": "auto", "when": "full", "auto_widths": True}, {}, {"policy": "halokv", "widths": "k8v4"}),
    ],
)
def test_a_request_has_its_own_or_the_servers(
    server: dict[str, Any], own: dict[str, Any], expected: dict[str, Any]
) -> None:
    fields = {config.option_name(name): value for name, value in own.items()}
    found = resolve(settings(server), fields, 1000)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    "server, own, told",
    [
        (FULL, {"when": "later"}, "kv_eviction_when='later': choose one of always, full"),
        (
            FULL,
            {"when": "full", "policy": "kvzip"},
            "kv_eviction_when='full': kvzip cannot evict so late; choose from auto",
        ),
        (FULL, {"when": "full", "prompts": "bounded"}, "choose kv_eviction_prompts whole"),
        (FULL, {"when": "full", "widths": "4"}, "goes with kv_eviction_widths 16, 8, k8v4 here, not 4"),
        (FULL, {"when": "full", "reuse": "boundary"}, "choose kv_eviction_reuse off"),
        (FULL, {"when": "full", "answers": "evict"}, "snapkv cannot evict so late; choose from random, streamingllm$"),
        ({"policy": "random", "repeats": "none"}, {"when": "full"}, "on a GPU, was started without --kv-eviction-when"),
        (
            FULL,
            {"pin": 5, "boundary": 300},
            "kv_eviction_pin=5.0: goes with kv_eviction_boundary and kv_eviction_reuse",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: dict[str, Any], own: dict[str, Any], told: str) -> None:
    fields = {config.option_name(name): value for name, value in own.items()}
    with pytest.raises(RequestFieldError, match=told):
        resolve(settings(server), fields, 1000)

"""Fields of requests that are evicted more than once: what they inherit, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_defensive.settings import engine as config
from vllm_defensive.settings.request import RequestFieldError, refuse_whole, resolve

ONCE = {"policy": "snapkv", "keep": 0.3}
AGAIN = {"policy": "snapkv", "budget": 512, "answers": "evict", "interval": 128}


def settings(given: dict[str, Any]) -> config.EvictionConfig:
    found = config.parse(given)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "server, own, expected",
    [
        (ONCE, {}, {"answers": "keep", "prompts": "whole", "keep": 0.3, "budget": None}),
        (ONCE, {"answers": "evict"}, {"answers": "evict", "interval": 256, "reuse": "off", "widths": "16"}),
        (ONCE, {"budget": 100}, {"answers": "keep", "budget": 100, "keep": 1.0}),
        (ONCE, {"budget": 100, "keep": 0.5}, {"budget": 100, "keep": 0.5}),
        (ONCE, {"prompts": "bounded", "prompt_interval": 64}, {"prompts": "bounded", "prompt_interval": 64}),
        (AGAIN, {}, {"answers": "evict", "interval": 128, "budget": 512, "keep": 1.0, "reuse": "off"}),
        (AGAIN, {"policy": "none"}, {"answers": "keep"}),
        (AGAIN, {"policy": "kvzip"}, {"answers": "keep", "reuse": "boundary"}),
        (AGAIN, {"answers": "keep"}, {"answers": "keep", "reuse": "boundary"}),
        # Who names a document's end wants it for later, whatever becomes of the answer.
        (AGAIN, {"boundary": 300}, {"answers": "evict", "reuse": "boundary"}),
        (AGAIN, {"boundary": 300, "protect": 32}, {"answers": "evict", "reuse": "off"}),
        ({**AGAIN, "reuse": "chat"}, {"boundary": 300}, {"answers": "evict", "reuse": "boundary"}),
        ({**AGAIN, "reuse": "chat"}, {}, {"answers": "evict", "reuse": "off"}),
        (AGAIN, {"boundary": 300, "prompts": "bounded"}, {"answers": "evict", "reuse": "off"}),
        (AGAIN, {"boundary": 300, "reuse": "off"}, {"answers": "evict", "reuse": "off"}),
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
        (ONCE, {"answers": "evict", "policy": "kvzip"}, "kv_eviction_answers='evict': kvzip evicts a request once"),
        (
            ONCE,
            {"answers": "evict", "widths": "4"},
            "answers='evict': goes with kv_eviction_widths 16, 8, k8v4 here, not 4",
        ),
        (AGAIN, {"widths": "8,4"}, "kv_eviction_widths='8,4': goes with kv_eviction_widths 16, 8, k8v4 here"),
        ({**AGAIN, "policy": "random", "repeats": "lasting"}, {"widths": "8"}, "goes with kv_eviction_widths 16 here"),
        (
            ONCE,
            {"answers": "evict", "reuse": "chat"},
            "kv_eviction_answers='evict': .*choose kv_eviction_reuse boundary",
        ),
        (ONCE, {"prompts": "bounded", "reuse": "boundary"}, "kv_eviction_prompts=.*choose kv_eviction_reuse off"),
        (ONCE, {"answers": "evict", "interval": 31}, "kv_eviction_interval=31: choose 32 or more"),
        (ONCE, {"prompts": "bounded", "prompt_interval": 9}, "kv_eviction_prompt_interval=9: choose 32 or more"),
        (ONCE, {"interval": 64}, "kv_eviction_interval=64: goes with kv_eviction_answers"),
        (AGAIN, {"prompt_interval": 64}, "kv_eviction_prompt_interval=64: goes with kv_eviction_prompts"),
        (ONCE, {"answers": "drop"}, "kv_eviction_answers='drop': choose one of keep, evict"),
        (ONCE, {"budget": 0}, "kv_eviction_budget=0: choose a whole number of tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: dict[str, Any], own: dict[str, Any], told: str) -> None:
    fields = {config.option_name(name): value for name, value in own.items()}
    with pytest.raises(RequestFieldError, match=told):
        resolve(settings(server), fields, 1000)


@pytest.mark.parametrize(
    "num_tokens, engines, refused", [(479, 1, False), (480, 1, True), (223, 2, False), (224, 2, True), (None, 1, True)]
)
def test_a_prompt_that_is_not_read_in_parts_must_fit_into_one_engines_memory(
    num_tokens: int | None, engines: int, refused: bool
) -> None:
    """Which has 15 blocks of 32 beside vLLM's own; each of two engines has 7."""
    engine = settings({"policy": "snapkv", "prompts": "bounded"})
    blocks = 16 if engines == 1 else 17
    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=blocks, block_size=32),
        parallel_config=SimpleNamespace(data_parallel_size=engines),
    )
    whole = resolve(engine, {"kv_eviction": "none"}, 1)
    refuse_whole(settings(ONCE), whole, num_tokens, config)
    refuse_whole(engine, resolve(engine, {}, 1), num_tokens, config)
    with pytest.raises(RequestFieldError, match="larger than the KV cache") if refused else nullcontext():
        refuse_whole(engine, whole, num_tokens, config)

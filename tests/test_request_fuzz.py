"""Whatever a request puts in its `kv_eviction*` fields: it is answered, or refused with HTTP 400; nothing breaks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.server import Server
from vllm_defensive.config import EvictionConfig, allowed_policies, known_policy
from vllm_defensive.request import RequestFieldError, RequestSettings, resolve, settings_or_none

NUM_TOKENS = 90
FIELDS = ("kv_eviction", "kv_eviction_keep", "kv_eviction_boundary", "kv_eviction_protect", "kv_eviction_report")

numbers = (
    st.integers(-3, NUM_TOKENS + 3)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.floats(-0.1, 1.1)
    | st.sampled_from([0, -0.0, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 5e-324, 1.0 + 2**-52])
    | st.integers()
)
texts = st.text(max_size=20) | st.sampled_from(
    [*allowed_policies(), "keep-all", "SnapKV", " snapkv", "0.5", "\x00", "%s"]
)
scalars = st.none() | st.booleans() | numbers | texts | st.characters(codec=None)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2), max_leaves=5
)
names = st.sampled_from(FIELDS) | texts.map("kv_eviction_{}".format) | texts
# Half of the fields hold what belongs there, so that requests with several right fields turn up as well.
right = {
    "kv_eviction": st.sampled_from(allowed_policies()),
    "kv_eviction_keep": st.floats(0, 1, exclude_min=True) | st.just(1),
    "kv_eviction_boundary": st.integers(1, NUM_TOKENS),
    "kv_eviction_protect": st.integers(0, NUM_TOKENS),
    "kv_eviction_report": st.sampled_from([0, 1, False, True]),
}
fields = st.builds(
    lambda some, others: {**some, **others},
    st.fixed_dictionaries({}, optional=right),
    st.dictionaries(names, values, max_size=2),
)
ENGINE = EvictionConfig(policy="snapkv", min_tokens=33)


class InScheduler:
    """As much of a request as the scheduler's side looks at."""

    resumable = False
    num_prompt_tokens = NUM_TOKENS

    def __init__(self, extra_args: Any) -> None:
        self.sampling_params = self
        self.extra_args = extra_args


@settings(max_examples=3000, deadline=None)
@given(fields)
def test_any_fields_are_taken_or_refused_by_name(extra_args: dict[str, Any]) -> None:
    try:
        found = resolve(ENGINE, extra_args, NUM_TOKENS)
    except RequestFieldError as error:
        assert error.field in extra_args and error.field.startswith("kv_eviction")
        assert str(error).startswith(f"{error.field}=")
        found = None
    in_scheduler = settings_or_none(ENGINE, InScheduler(extra_args))
    assert in_scheduler == found if found is not None else in_scheduler.policy == "none"
    assert_usable(in_scheduler)


def assert_usable(found: RequestSettings) -> None:
    """What the block manager is given: a policy, a ratio and positions that it can count with."""
    assert found.policy == known_policy(found.policy)
    assert math.isfinite(found.keep) and 0 < found.keep <= 1
    assert found.boundary is None or (type(found.boundary) is int and 1 <= found.boundary <= NUM_TOKENS)
    assert type(found.protect) is int and 0 <= found.protect <= NUM_TOKENS
    assert found.report in (False, True)
    for block_size in (16, 32):
        kept = ENGINE.packed_blocks(found.boundary or NUM_TOKENS, 0, block_size, found.policy, found.keep)
        assert 0 <= kept <= NUM_TOKENS // block_size


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("fuzz") / "log"
    flags = (
        "--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "512", "--num-gpu-blocks-override", "60",
        "--kv-eviction", "none", "--kv-eviction-per-request", "--kv-eviction-min-tokens", "33",
    )  # fmt: skip
    with Server(tiny_model, flags, log) as server:
        with httpx.Client(base_url=server.url, timeout=60, headers={"Content-Type": "application/json"}) as client:
            yield client
            assert client.get("/health").status_code == 200, "the engine lives on"
        assert "EngineDeadError" not in log.read_text(errors="replace")


def status_of(client: httpx.Client, chat: bool, body: dict[str, Any]) -> int:
    """HTTP status; a stream that began must end without an error event."""
    if chat:
        path, prompt = "/v1/chat/completions", {"messages": [{"role": "user", "content": "é#" * (NUM_TOKENS // 3)}]}
    else:
        path, prompt = "/v1/completions", {"prompt": [7] * NUM_TOKENS}
    # As other clients may: numbers that JSON does not know, lone surrogates escaped.
    content = json.dumps({"model": "tiny", "max_tokens": 1, "temperature": 0, **prompt, **body})
    reply = client.post(path, content=content)
    if body.get("stream") and reply.status_code == 200:
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
        assert events and not [event for event in map(json.loads, events) if "error" in event]
    return reply.status_code


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra_args=fields | values, chat=st.booleans(), stream=st.booleans())
def test_any_fields_over_http_are_answered_or_refused_with_400(
    client: httpx.Client, extra_args: Any, chat: bool, stream: bool
) -> None:
    status = status_of(client, chat, {"vllm_xargs": extra_args, "stream": stream})
    assert status in (200, 400), extra_args
    if not isinstance(extra_args, dict) or not any(name in right for name in extra_args):
        return
    if status == 200:
        resolve(ENGINE, json.loads(json.dumps(extra_args)), NUM_TOKENS)  # what was taken is right

"""Whatever a request puts in its `kv_eviction*` fields: it is answered, or refused with HTTP 400; nothing breaks.

FUZZ_CASES in the environment sets how many cases each test tries, FUZZ_SUMMARY names a file for what came of those over
HTTP. `--hypothesis-profile random` tries other ones.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.server import Server, commit
from vllm_defensive.settings.engine import EvictionConfig, allowed_policies, known_policy
from vllm_defensive.settings.request import RequestFieldError, RequestSettings, items_of, resolve, settings_or_none

CASES = os.environ.get("FUZZ_CASES")
NUM_TOKENS = 90
FIELDS = (
    "kv_eviction",
    "kv_eviction_keep",
    "kv_eviction_boundary",
    "kv_eviction_protect",
    "kv_eviction_reuse",
    "kv_eviction_pin",
    "kv_eviction_report",
)

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
    "kv_eviction_reuse": st.sampled_from(["off", "boundary", "prefix", "chat"]),
    "kv_eviction_pin": st.integers(0, 100) | st.floats(0, 100),
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
    mm_features: Sequence[Any] = ()

    def __init__(self, extra_args: Any) -> None:
        self.sampling_params = self
        self.extra_args = extra_args


@settings(max_examples=int(CASES or 1500), deadline=None)
@given(fields)
def test_any_fields_are_taken_or_refused_by_name(extra_args: dict[str, Any]) -> None:
    try:
        found = resolve(ENGINE, extra_args, NUM_TOKENS)
    except RequestFieldError as error:
        assert error.field in extra_args
        assert re.sub("[^a-z0-9]", "", error.field.lower()).startswith("kveviction"), "also ours, spelled otherwise"
        assert str(error).startswith(f"{error.field}=")
        found = None
    in_scheduler = settings_or_none(ENGINE, InScheduler(extra_args))
    assert in_scheduler == found if found is not None else in_scheduler.policy == "none"
    assert_usable(in_scheduler)


@pytest.mark.parametrize(
    ("boundary", "way_out"),
    [(39, None), (40, None), (41, "choose 40 or 60"), (59, "choose 40 or 60"), (60, None), (5, "choose 20")],
)
def test_a_boundary_does_not_cut_an_image(boundary: int, way_out: str | None) -> None:
    """It would hide the rest of it from its beginning, or keep half of it."""
    request = InScheduler({"kv_eviction_boundary": boundary})
    places = [("image", (0, 20)), ("audio", (40, 20)), ("prompt_embeds", (20, 20))]
    request.mm_features = [
        SimpleNamespace(modality=kind, mm_position=SimpleNamespace(offset=offset, length=length))
        for kind, (offset, length) in places
    ]
    items = items_of((f.modality, f.mm_position) for f in request.mm_features)
    assert items == [(0, 20), (40, 60)]
    if way_out is None:
        assert resolve(ENGINE, request.extra_args, NUM_TOKENS, items) == settings_or_none(ENGINE, request)
    else:
        with pytest.raises(RequestFieldError, match=f"kv_eviction_boundary={boundary}: inside an image.*; {way_out}$"):
            resolve(ENGINE, request.extra_args, NUM_TOKENS, items)
        assert settings_or_none(ENGINE, request).policy == "none"


def assert_usable(found: RequestSettings) -> None:
    """What the block manager is given: a policy, a ratio and positions that it can count with."""
    assert found.policy == known_policy(found.policy)
    assert math.isfinite(found.keep) and 0 < found.keep <= 1
    assert found.boundary is None or (type(found.boundary) is int and 1 <= found.boundary <= NUM_TOKENS)
    assert type(found.protect) is int and 0 <= found.protect <= NUM_TOKENS
    assert found.report in (False, True)
    for block_size in (16, 32):
        region = ENGINE.region(found.boundary or NUM_TOKENS, 0, block_size)
        kept = ENGINE.budget_blocks(region, found.policy, found.keep)
        assert 0 <= kept <= NUM_TOKENS // block_size


@pytest.fixture(scope="module")
def seen() -> Iterator[Counter[str]]:
    """How often what came back, by the kind of request."""
    counts: Counter[str] = Counter()
    tested = commit()
    yield counts
    if "FUZZ_SUMMARY" in os.environ:
        command = f"FUZZ_CASES={CASES or 'unset'} python -m pytest {' '.join(sys.argv[1:])}"
        by_status = Counter(
            {status: sum(n for k, n in counts.items() if k.endswith(status)) for status in ("200", "400")}
        )
        summary = {
            "command": command, "commit": tested, "requests": counts.total(), "by_status": by_status,
            "others": counts.total() - by_status.total(), "by_kind": dict(sorted(counts.items())),
        }  # fmt: skip
        Path(os.environ["FUZZ_SUMMARY"]).write_text(json.dumps(summary, indent=1) + "\n")


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
            evicted = re.findall(r"(?m)^vllm:kv_eviction_requests_total\{.*\} (\S+)$", client.get("/metrics").text)
            assert sum(map(float, evicted)) > 0
        assert "EngineDeadError" not in log.read_text(errors="replace")


CHAT = {"messages": [{"role": "user", "content": "é#" * (NUM_TOKENS // 3)}]}
# What else a request may ask for; several prompts are of different lengths, the shortest of NUM_TOKENS.
shapes = st.fixed_dictionaries(
    {"chat": st.booleans(), "stream": st.booleans(), "n": st.integers(1, 3), "prompts": st.integers(1, 3)}
)


def status_of(client: httpx.Client, extra_args: Any, chat: bool, stream: bool, n: int, prompts: int) -> int:
    """HTTP status; a stream that began must end without an error event, and every answer must be there."""
    if chat:
        path, prompt, answers = "/v1/chat/completions", CHAT, n
    else:
        several = [[7 + i] * (NUM_TOKENS + 20 * i) for i in range(prompts)]
        path, prompt, answers = "/v1/completions", {"prompt": several if prompts > 1 else several[0]}, n * prompts
    # vLLM takes n > 1 only of what it calls random, which with one token to choose from is not.
    body = {"model": "tiny", "max_tokens": 2, "temperature": 1, "top_k": 1, "n": n, "stream": stream, **prompt}
    # As other clients may: numbers that JSON does not know, lone surrogates escaped.
    reply = client.post(path, content=json.dumps({**body, "vllm_xargs": extra_args}))
    if reply.status_code == 200:
        lines = reply.text.splitlines() if stream else [f"data: {reply.text}"]
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert not [event for event in events if "error" in event]
        assert {choice["index"] for event in events for choice in event["choices"]} == set(range(answers))
    return reply.status_code


@pytest.fixture(scope="module")
def chat_tokens(client: httpx.Client) -> int:
    """Tokens of the chat's prompt."""
    return client.post("/v1/chat/completions", json={"max_tokens": 1, **CHAT}).json()["usage"]["prompt_tokens"]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(3600)
@settings(max_examples=int(CASES or 600), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra_args=fields | values, shape=shapes)
def test_any_fields_over_http_are_answered_or_refused_with_400(
    client: httpx.Client, seen: Counter[str], chat_tokens: int, extra_args: Any, shape: dict[str, Any]
) -> None:
    status = status_of(client, extra_args, **shape)
    kind = "chat" if shape["chat"] else f"completion of {shape['prompts']} prompts"
    seen[f"{kind}, n={shape['n']}{', stream' * shape['stream']}: {status}"] += 1
    assert status in (200, 400), extra_args
    if not isinstance(extra_args, dict) or not any(name in right for name in extra_args):
        return
    if status == 200:  # what was taken is right
        resolve(ENGINE, json.loads(json.dumps(extra_args)), chat_tokens if shape["chat"] else NUM_TOKENS)

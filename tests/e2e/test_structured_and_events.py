"""Beside eviction, answers follow a grammar, and cache events tell routers what the prefix cache really holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.e2e.engines import assert_all_returned, audit_of, engine, pool_of, random_prompts

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK = 32


def prompts(seed: int) -> list[list[int]]:
    """Four prompts that begin alike."""
    shared, *others = random_prompts((256, 444, 77, 300, 8), seed=seed)
    return [shared + other for other in others]


PROMPTS = prompts(31)
OWN = [{}, {}, {"kv_eviction_boundary": 333}, {"kv_eviction": "none"}]
PATTERN = r"(ab|cd|x){6}-[0-9]{4}"
COMMON: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 200}


def grammar() -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(regex=PATTERN), "max_tokens": 40}


def ask(llm: Any, fields: list[dict[str, Any]], texts: list[list[int]] = PROMPTS, **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, extra_args=own, **sampling) for own in fields]
    return list(llm.generate([{"prompt_token_ids": p} for p in texts], params, use_tqdm=False))


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audits")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"ipc://{tmp_path_factory.mktemp('events')}/socket"


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> list[Any]:
    """What stock vLLM answers under the grammar."""
    with engine(tiny_model, **COMMON) as llm:
        return ask(llm, [{}] * len(PROMPTS), **grammar())


@pytest.fixture(scope="module")
def llm(tiny_model: Path, audits: Path, endpoint: str, stock: list[Any]) -> Iterator[Any]:
    """A small pool, from which cached blocks are soon taken for something else. stock: its engine has to go first."""
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    settings = {"audit": str(audits), "max_model_len": 1024, "num_gpu_blocks_override": 46, **COMMON}
    with engine(tiny_model, "layer-defensivekv", keep=0.3, kv_events_config=events, **settings) as llm:
        yield llm


def test_answers_follow_a_grammar(llm: Any, stock: list[Any], audits: Path) -> None:
    expected = [output.outputs[0].token_ids for output in stock]
    whole = ask(llm, [{**own, "kv_eviction": "keep-all"} for own in OWN], **grammar())
    assert [output.outputs[0].token_ids for output in whole] == expected
    evicted = ask(llm, OWN, **grammar())
    for own, output in zip(OWN, evicted, strict=True):
        assert re.fullmatch(PATTERN, output.outputs[0].text), output.outputs[0].text
        if "kv_eviction" not in own:
            assert not bool(audit_of(audits, output.request_id).mask().all())
    assert [output.outputs[0].token_ids for output in evicted] != expected, "what was dropped tells"
    assert_all_returned(llm)


def cached_hashes(llm: Any) -> set[Any]:
    """What the prefix cache would hand out, named as in events."""
    from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

    hashed = [b.block_hash for b in pool_of(llm).blocks if b.block_hash is not None and not b.is_null]
    return {maybe_convert_block_hash(get_block_hash(block_hash)) for block_hash in hashed}


def blocks(tokens: list[int]) -> list[tuple[int, ...]]:
    """The full blocks of a text."""
    return [tuple(tokens[i : i + BLOCK]) for i in range(0, len(tokens) - BLOCK + 1, BLOCK)]


class Router:
    """Somebody who follows the events. held: how many blocks there are of each hash (vLLM keeps some twice).
    tokens: of each hash. removed: how many went."""

    def __init__(self, endpoint: str) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self.held = Counter[Any]()
        self.tokens: dict[Any, tuple[int, ...]] = {}
        self.removed, self.kinds = 0, set[Any]()
        self._decoder = msgspec.msgpack.Decoder(type=KVEventBatch)
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.poll(300)  # for the subscription to arrive; nothing is sent meanwhile

    def follow(self) -> None:
        """Take all events that are on their way."""
        while self._socket.poll(1000):
            *_, payload = self._socket.recv_multipart()
            for event in self._decoder.decode(payload).events:
                getattr(self, f"_{type(event).__name__}")(event)

    def there(self) -> set[Any]:
        return set(+self.held)

    def close(self) -> None:
        self._socket.close(linger=0)

    def _BlockStored(self, event: Any) -> None:
        assert event.block_size == BLOCK and len(event.token_ids) == BLOCK * len(event.block_hashes)
        self.kinds.add(event.kv_cache_spec_kind)
        for i, block_hash in enumerate(event.block_hashes):
            self.held[block_hash] += 1
            self.tokens[block_hash] = tuple(event.token_ids[i * BLOCK : (i + 1) * BLOCK])

    def _BlockRemoved(self, event: Any) -> None:
        self.removed += len(event.block_hashes)
        self.held.subtract(event.block_hashes)
        assert min(self.held.values()) >= 0, "what went had been there"

    def _AllBlocksCleared(self, event: Any) -> None:
        self.held.clear()


def test_events_tell_what_the_prefix_cache_holds(llm: Any, endpoint: str) -> None:
    assert_all_returned(llm)
    router = Router(endpoint)
    try:
        seen: set[tuple[int, ...]] = set()
        for texts in (PROMPTS, PROMPTS, prompts(33)):
            answers = ask(llm, OWN, texts, max_tokens=70, ignore_eos=True)
            router.follow()
            assert router.there() == cached_hashes(llm)
            # Of evicted requests nothing from the eviction on: it was computed from an evicted context.
            exact = (*texts[:2], texts[2][:333], texts[3] + list(answers[3].outputs[0].token_ids))
            seen |= {part for tokens in exact for part in blocks(tokens)}
            assert {router.tokens[block_hash] for block_hash in router.there()} <= seen
        assert router.removed > 0 and router.kinds == {"full_attention"}
        assert_all_returned(llm)
        ask(llm, OWN, max_tokens=1)
        router.follow()
        assert router.there() == cached_hashes(llm)
    finally:
        router.close()

"""Blocks that were given back are nobody's: garbage in them changes nothing, and those that are shared never change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.e2e.engines import (
    Answer,
    answer_of,
    assert_all_returned,
    audit_of,
    caches_of,
    engine,
    generate,
    largest_difference,
    metrics_of,
    pool_of,
    random_prompts,
    scheduler_of,
)
from tests.engine.integrity import check_integrity
from tests.reference_model import ReferenceLlama, decode_logprobs

pytestmark = pytest.mark.e2e

N, W = 32, 32
MAX_MODEL_LEN = 1024
# Twice the largest error of an un-evicted request in float32 (see test_masked_reference.py)
FLOAT32_NOISE = 3e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def llm(tiny_model: Path, folder: Path) -> Iterator[Any]:
    arguments = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "num_gpu_blocks_override": 300}
    with engine(tiny_model, "layer-defensivekv", keep=0.3, audit=str(folder), **arguments) as llm:
        yield llm


@pytest.fixture(autouse=True)
def everything_is_returned(llm: Any) -> Iterator[None]:
    yield
    assert_all_returned(llm)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> ReferenceLlama:
    return ReferenceLlama(tiny_model)


def error(reference: ReferenceLlama, folder: Path, prompt: list[int], answer: Answer) -> float:
    """Largest difference from the masked reference; without an audit, from the full one."""
    evicted = list(folder.glob(f"{answer.request_id}-*"))
    kept = audit_of(folder, answer.request_id).mask() if evicted else None
    return float((answer.logprobs - decode_logprobs(reference, prompt, answer.tokens, kept)).abs().max())


def start(llm: Any, prompts: list[list[int]], num_tokens: int, name: str) -> list[str]:
    """Queue requests without running them; returns their ids."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=1)
    for i, prompt in enumerate(prompts):
        llm.llm_engine.add_request(f"{name}{i}", {"prompt_token_ids": prompt}, params)
    return [f"{name}{i}" for i in range(len(prompts))]


def finish(llm: Any, after_step: Any = None) -> dict[str, Answer]:
    """Step until all is done; calls `after_step()` after every step."""
    answers = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                answers[output.request_id] = answer_of(output)
        if after_step is not None:
            after_step()
    return answers


def test_prompts_of_every_edge_length_get_right_answers(llm: Any, folder: Path, reference: ReferenceLlama) -> None:
    lengths = (1, W - 1, W, W + 1, 2 * N - 1, 2 * N, 20 * N, 20 * N + 1, 512 + W - 1, MAX_MODEL_LEN - 1)
    prompts = random_prompts(lengths, seed=3)
    for prompt, answer in zip(prompts, generate(llm, prompts, 8), strict=True):
        assert len(answer.tokens) == min(8, MAX_MODEL_LEN - len(prompt))
        assert error(reference, folder, prompt, answer) <= FLOAT32_NOISE, len(prompt)
        assert bool(list(folder.glob(f"{answer.request_id}-*"))) == (len(prompt) >= 2 * N), len(prompt)


def test_garbage_in_freed_blocks_changes_nothing(llm: Any) -> None:
    prompts = random_prompts((700, 333, 96, 640, 50), seed=4)
    expected = generate(llm, prompts, 40)
    assert llm.reset_prefix_cache()
    ids = start(llm, prompts, 40, "poisoned")
    generator = torch.Generator().manual_seed(0)
    overwritten = set()

    def poison() -> None:
        free = [b.block_id for b in pool_of(llm).blocks if b.ref_cnt == 0 and not b.is_null]
        overwritten.update(free)
        for cache in caches_of(llm):
            # A hundred times the size of a key: attention to one of them would drown all others.
            garbage = torch.randn(cache[0].shape, generator=generator) * 100
            cache[free] = garbage.to(cache.dtype)

    evicted = metrics_of(llm)["vllm:kv_eviction_requests"]
    answers = finish(llm, poison)
    assert metrics_of(llm)["vllm:kv_eviction_requests"] == evicted + 4, "all but the last"
    assert largest_difference([answers[i] for i in ids], expected) <= 1e-6  # the same sums, perhaps in another batch
    assert len(overwritten) > 30


def hashed_blocks(llm: Any) -> dict[tuple[int, Any], Tensor]:
    """Contents of every block that the prefix cache would hand out, or that several requests read."""
    blocks = [b for b in pool_of(llm).blocks if b.block_hash is not None and not b.is_null]
    return {(b.block_id, b.block_hash): torch.stack([cache[b.block_id] for cache in caches_of(llm)]) for b in blocks}


def test_what_others_can_see_is_never_written(llm: Any, folder: Path, reference: ReferenceLlama) -> None:
    """Twenty questions about one text, in two waves; every block that has a hash keeps its bytes while it has it."""
    shared = random_prompts([500], seed=5)[0]
    prompts = [shared + q for q in random_prompts([20 + 11 * i for i in range(20)], seed=6)]
    known = hashed_blocks(llm)
    checked = 0

    def check() -> None:
        nonlocal known, checked
        now = hashed_blocks(llm)
        for key in known.keys() & now.keys():
            assert torch.equal(known[key], now[key]), key
            checked += 1
        known = now

    first = start(llm, prompts[:12], 12, "first")
    for _ in range(4):
        llm.llm_engine.step()
        check()
    second = start(llm, prompts[12:], 12, "second")
    answers = finish(llm, check)
    assert checked > 500
    for prompt, request_id in zip(prompts, first + second, strict=True):
        assert error(reference, folder, prompt, answers[request_id]) <= FLOAT32_NOISE, request_id
    audits = [audit_of(folder, i) for i in first + second if list(folder.glob(f"{i}-*"))]
    assert {a.shared_blocks for a in audits} >= {500 // N}, "the text was left in place for most of them"


def test_random_aborts_leak_nothing(llm: Any) -> None:
    rng = random.Random(0)
    shared = random_prompts([200], seed=7)[0]
    live: list[str] = []
    answers: dict[str, Answer] = {}
    for step in range(120):
        if len(live) < 8 and rng.random() < 0.5:
            prompt = shared[: rng.choice([0, 64, 200])] + random_prompts([rng.randrange(1, 500)], seed=step)[0]
            live += start(llm, [prompt], rng.randrange(1, 30), f"abort{step}-")
        if live and rng.random() < 0.3:
            llm.llm_engine.abort_request([live.pop(rng.randrange(len(live)))])
        if llm.llm_engine.has_unfinished_requests():
            done = [o.request_id for o in llm.llm_engine.step() if o.finished]
            live = [i for i in live if i not in done]
        check_integrity(scheduler_of(llm).eviction_manager)
    answers = finish(llm)
    assert set(answers) <= set(live)


def test_counters_say_what_the_audits_say(llm: Any, folder: Path) -> None:
    before = metrics_of(llm)
    prompts = random_prompts((700, 20, 333, 1000), seed=8)
    answers = generate(llm, prompts, 4)
    grown = {k: v - before[k] for k, v in metrics_of(llm).items() if k.startswith("vllm:kv_eviction")}
    audits = [audit_of(folder, a.request_id) for a, p in zip(answers, prompts, strict=True) if len(p) > W]
    assert grown["vllm:kv_eviction_requests"] == len(audits) == 3
    assert grown["vllm:kv_eviction_prompt_tokens"] == sum(a.stop for a in audits)
    assert grown["vllm:kv_eviction_kept_tokens"] == sum(a.kept_counts.float().mean() for a in audits)
    assert grown["vllm:kv_eviction_freed_blocks"] == sum(a.stop // N - a.packed_blocks for a in audits)
    assert 0 < grown["vllm:kv_eviction_seconds"] < 30

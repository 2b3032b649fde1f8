"""Thousands of random steps: requests with settings of their own come, share prefixes, guess ahead, run out of memory,
are aborted; nothing leaks.

Every step runs on the ghost worker, which checks what each request would read; every reference to a block is counted.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from tests.learned_scores import random_score
from vllm_defensive.policy import PRESETS


@pytest.fixture(scope="module")
def score(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """File of a learned score, which the ghost worker does not read."""
    path = tmp_path_factory.mktemp("score") / "score.safetensors"
    random_score(tiny_model, path, 2, 2, 32)
    return str(path)


def own_settings(rng: random.Random, num_tokens: int) -> dict[str, Any] | None:
    """Fields of a request of so many prompt tokens: every second one has none, the others any of them at once."""
    fields = {
        "kv_eviction": rng.choice(["none", "streamingllm", "echokv", "h2o", "kvzip", "learnedkv", "keep-all"]),
        "kv_eviction_keep": rng.choice([0.05, 0.3, 0.6]),
        "kv_eviction_boundary": rng.randint(num_tokens // 2 + 1, num_tokens),
        "kv_eviction_protect": min(rng.choice([1, 64, 100]), num_tokens),
    }
    chosen = {name: value for name, value in fields.items() if rng.random() < 0.4}
    return chosen if rng.random() < 0.5 else None


def walk(h: Harness, seed: int, steps: int, *, max_len: int, abort: float) -> dict[str, int]:
    """Random work for `steps` steps, then until all is done; returns what happened. Turns extend earlier answers."""
    rng = random.Random(seed)
    finished: list[str] = []
    lengths: dict[str, int] = {}
    happened = {"aborted": 0, "preempted": 0, "second turns": 0}
    for _ in range(steps):
        if len(h.live) < 12 and rng.random() < 0.4:
            prompt = text(rng.choice([0, 64, 200]), rng.randrange(3)) + text(rng.randrange(1, 200), rng.randrange(400))
            if finished and rng.random() < 0.3:
                happened["second turns"] += 1
                prompt = h.tokens(rng.choice(finished)) + text(rng.randrange(1, 60), rng.randrange(400))
            prompt = prompt[: max_len - 200]
            own = own_settings(rng, len(prompt))
            added = h.add(prompt, max_tokens=rng.choice([1, 20, 200]), priority=rng.randrange(3), extra_args=own)
            finished.append(added)
            lengths[added] = len(prompt)
        if h.live and rng.random() < abort:
            happened["aborted"] += 1
            h.abort(rng.choice(h.live))
        h.check()
        output = h.step()
        happened["preempted"] += len(output.preempted_req_ids or ())
        h.check()
    h.run()
    h.assert_all_returned()
    happened["boundaries"] = sum(e.region.stop < lengths[e.request_id] for e in h.evictions)
    happened["echoes"] = sum(PRESETS[e.policy].reconstructs for e in h.evictions)
    happened["policies"] = len({e.policy for e in h.evictions})
    return happened


@pytest.mark.parametrize("scheduling", ["fcfs", pytest.param("priority", marks=pytest.mark.slow)])
@pytest.mark.parametrize("asynchronous, drafts", [(False, 0), (True, 0), (False, 4)], ids=["sync", "async", "drafts"])
@pytest.mark.parametrize(
    "num_blocks, shared, policy, keep, caching",
    [
        (30, "keep", "snapkv", 0.3, True),
        (30, "evict", "snapkv", 0.3, True),
        (42, "keep", "keep-all", 1.0, True),
        (40, "keep", "snapkv", 0.8, True),
        (28, "keep", "snapkv", 0.2, False),
    ],
    ids=["keep0.3", "evict0.3", "keep-all", "keep0.8", "uncached"],
)
def test_random_work_leaks_nothing_and_reads_nothing_wrong(
    tiny_model: Path,
    score: str,
    asynchronous: bool,
    drafts: int,
    scheduling: str,
    num_blocks: int,
    shared: str,
    policy: str,
    keep: float,
    caching: bool,
) -> None:
    h = Harness(
        tiny_model,
        num_blocks=num_blocks,
        policy=policy,
        asynchronous=asynchronous,
        scheduling=scheduling,
        chunk=96,
        max_model_len=640,
        shared=shared,
        keep=keep,
        caching=caching,
        drafts=drafts,
        learned=score,
        reuse="off",  # `test_published.py` has a walk of its own
    )
    happened = walk(h, seed=len(scheduling), steps=800, max_len=640, abort=0.05)
    assert len(h.evictions) > 10
    assert happened["aborted"] and happened["second turns"]
    assert happened["boundaries"] and (happened["policies"] > 1 or policy == "keep-all")
    assert not drafts or (h.accepted[0] and h.accepted[drafts])
    assert happened["preempted"] or keep != 0.3, "the small pool is there to force some out"


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(3, 8))])
def test_a_long_random_walk(tiny_model: Path, score: str, asynchronous: bool, seed: int) -> None:
    rng = random.Random(seed)
    h = Harness(
        tiny_model,
        num_blocks=rng.choice([36, 44, 200]),
        drafts=0 if asynchronous else rng.choice([0, 2, 5]),
        window=rng.choice([1, 32]),
        asynchronous=asynchronous,
        scheduling=rng.choice(["fcfs", "priority"]),
        chunk=rng.choice([33, 64, 100, 512]),
        max_model_len=640,
        shared=rng.choice(["keep", "evict"]),
        keep=rng.choice([0.05, 0.3, 0.6]),
        max_num_seqs=rng.choice([3, 32]),
        learned=score,
        reuse="off",
    )
    happened = walk(h, seed, steps=3000, max_len=640, abort=0.03)
    assert len(h.evictions) > 60 and happened["boundaries"] > 10 and happened["policies"] > 3
    assert happened["echoes"]

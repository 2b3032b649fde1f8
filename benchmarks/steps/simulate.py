"""Scheduler steps without a model: stock vLLM's scheduler and ours take turns over the same requests.

Only `schedule` and `update_from_output` are timed, in processor time of this thread. Rows take turns block by block, so
that a change of the machine's speed hits all of them.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_defensive

BLOCK_SIZE = 32
RUNNING = 32  # requests at once: as one ends, the next arrives
CHUNK = 2048
POOL_BLOCKS = 16384  # ample, so that rows differ in nothing but their scheduler
BLOCK_STEPS = 250  # steps of a row before the next row's turn

ROWS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock again": {},
    "ours, nothing evicted": {"policy": "none", "per_request": True},
    "ours, all evicted": {"policy": "snapkv", "keep": 0.2},
}
"""Settings of `vllm_defensive.engine_kwargs` by row; the second row shows how much two equal ones differ."""

QUEUE_BLOCKS = 1600  # a pool for some thirty requests, so that the first of a queue is looked at in every step
QUEUE_ROWS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock again": {},
    # Little is evicted, so that about as many requests run as in stock's row.
    "ours, eager": {"policy": "snapkv", "keep": 0.9},
    "ours, steady": {"policy": "snapkv", "keep": 0.9, "admission": "steady"},
}
"""The rows where a queue waits for memory, of requests that share nothing."""

PACKINGS_ROWS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock again": {},
    "ours, all evicted": {"policy": "snapkv", "keep": 0.2, "reuse": "off"},
    "ours, packings held": {"policy": "snapkv", "keep": 0.2, "reuse": "prefix"},
}
"""The rows where each request looks for a packing to begin with, among those of other documents."""


def make_scheduler(model: Path, asynchronous: bool, blocks: int = POOL_BLOCKS, **settings: Any) -> Any:
    """A scheduler of vLLM's, or with settings one of ours, over a pool of so many blocks; nothing runs its steps."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_defensive.engine import scheduler
    from vllm_defensive.engine.spec import as_evictable
    from vllm_defensive.settings.engine import from_vllm_config

    config = EngineArgs(
        model=str(model),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=2 * RUNNING,
        max_model_len=4096,
        enable_prefix_caching=True,
        **(vllm_defensive.engine_kwargs(**settings) if settings else {}),
    ).create_engine_config()
    # The CPU platform turns asynchronous scheduling off; a scheduler does not care who runs its steps.
    config.scheduler_config.async_scheduling = asynchronous
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    make: Callable[..., Any] = AsyncScheduler if asynchronous else Scheduler
    if (eviction := from_vllm_config(config)) is not None:
        spec, make = as_evictable(spec, eviction), scheduler.make_scheduler
    return make(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["model.layers.0.self_attn.attn"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        log_stats=True,
    )


def block_hasher() -> Callable[[Any], Any]:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    return get_request_block_hasher(BLOCK_SIZE, hash_fn)


@dataclass
class Block:
    """One row's turn. seconds: of the two timed calls. running: requests in all its steps together."""

    seconds: float = 0.0
    steps: int = 0
    running: int = 0


class Row:
    """A scheduler and its endless load: of four prompts one is long, two are of a chat with a common start. With a
    queue, so many requests more are always there, and none shares anything."""

    def __init__(self, scheduler: Any, hasher: Callable[[Any], Any], seed: int, queue: int = 0) -> None:
        self.scheduler = scheduler
        self._asynchronous = scheduler.vllm_config.scheduler_config.async_scheduling
        self._hasher = hasher
        self._random = random.Random(seed)
        self._shared = [self._random.randrange(2, 30000) for _ in range(512)]
        self._added, self._queue = 0, queue
        self._in_flight: deque[Any] = deque()

    def _arrive(self) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        kind, draw = self._added % 4, self._random
        length = draw.randrange(1500, 3000) if kind == 0 else draw.randrange(200, 600)
        shares = kind > 1 and not self._queue
        prompt = (self._shared if shares else []) + [draw.randrange(2, 30000) for _ in range(length)]
        parameters = SamplingParams(max_tokens=draw.randrange(64, 192), ignore_eos=True, temperature=0)
        self.scheduler.add_request(
            Request(f"r{self._added}", prompt, parameters, None, block_hasher=self._hasher, arrival_time=0.0)
        )
        self._added += 1

    def pack(self, documents: int) -> None:
        """Leave packings of so many short documents, of many lengths, behind."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        manager = getattr(self.scheduler, "eviction_manager", None)
        if manager is None or manager.eviction.reuse == "off":
            return
        for i in range(documents):
            length = (9 + i % 64) * BLOCK_SIZE
            prompt = [self._random.randrange(2, 30000) for _ in range(length + 1)]
            parameters = SamplingParams(max_tokens=1, extra_args={"kv_eviction_boundary": length})
            self.scheduler.add_request(Request(f"document-{i}", prompt, parameters, None, block_hasher=self._hasher))
        while self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.scheduler.update_from_output(output, self._answer(output))
        assert len(manager.lifecycle.library) == documents, "the pool is too small for them"

    def run(self, steps: int) -> Block:
        """Schedule and process `steps` steps; what a model would answer is made up in between, untimed."""
        block = Block(steps=steps)
        for _ in range(steps):
            while len(self.scheduler.requests) < RUNNING + self._queue:
                self._arrive()
            start = time.thread_time()
            output = self.scheduler.schedule()
            block.seconds += time.thread_time() - start
            block.running += len(output.num_scheduled_tokens)
            self._in_flight.append((output, self._answer(output)))
            while len(self._in_flight) > self._asynchronous:
                done = self._in_flight.popleft()
                start = time.thread_time()
                self.scheduler.update_from_output(*done)
                block.seconds += time.thread_time() - start
        return block

    def _answer(self, output: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        # A token that depends on the position alone, so that all rows are told the same.
        tokens = [
            [] if requests[i].is_prefill_chunk else [2 + requests[i].num_computed_tokens * 17 % 29989] for i in ids
        ]
        return ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled_token_ids=tokens)


def simulate(
    model: Path, steps: int, repeats: int, asynchronous: bool, queue: int = 0, packings: int = 0
) -> dict[str, Any]:
    """Run `steps` steps of every row, `repeats` times over with other requests, and compare with the first row.

    queue: this many requests wait for memory all the time. packings: so many outlive their requests in the last row.
    """
    kinds, blocks = (QUEUE_ROWS, QUEUE_BLOCKS) if queue else (PACKINGS_ROWS if packings else ROWS, POOL_BLOCKS)
    hasher = block_hasher()
    rounds: list[dict[str, Block]] = []
    evicted = 0
    for seed in range(repeats):
        rows = {
            name: Row(make_scheduler(model, asynchronous, blocks, **settings), hasher, seed, queue)
            for name, settings in kinds.items()
        }
        for row in rows.values():
            row.pack(packings)
            row.run(BLOCK_STEPS)  # warms up, and fills the batch
        gc.collect()
        total = {name: Block() for name in rows}
        for turn in range(max(1, steps // BLOCK_STEPS)):
            names = list(rows)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                block = rows[name].run(min(BLOCK_STEPS, steps))
                total[name].seconds += block.seconds
                total[name].steps += block.steps
                total[name].running += block.running
        rounds.append(total)
        evicted += list(rows.values())[-1].scheduler.eviction_manager.lifecycle.totals.requests
        print(f"  round {seed + 1} of {repeats}", flush=True)
    about = {"steps": steps, "repeats": repeats, "asynchronous": asynchronous, "queue": queue, "evicted": evicted}
    about |= {"packings": packings} if packings else {}
    return {**about, **compare(rounds)}


def compare(rounds: Sequence[dict[str, Block]]) -> dict[str, Any]:
    """Microseconds a step, requests a step, and the ratio to the first row, round by round."""
    rows = {}
    first = next(iter(rounds[0]))
    for name in rounds[0]:
        ratios = [(r[name].seconds / r[name].steps) / (r[first].seconds / r[first].steps) for r in rounds]
        rows[name] = {
            "microseconds_a_step": statistics.median(1e6 * r[name].seconds / r[name].steps for r in rounds),
            "requests_a_step": statistics.fmean(r[name].running / r[name].steps for r in rounds),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return {"rows": rows}

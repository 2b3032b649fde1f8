"""Our Python in a decode step of a running engine, by the number of evicted rows in a batch of 64.

Each method of ours that wraps one of vLLM's is timed together with the one it wraps; the difference is ours. Methods
called once for every request (the block manager's) are left out, as timing them would cost more than they do:
`simulate.py` has them. Times are processor time of the engine's only thread. What the attention kernels do is no part.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm_defensive
from benchmarks.latency import make_engine, worker_of

BATCH, LONG = 64, 257  # a prompt of LONG tokens is evicted, one of a token less is not
PARTS = ("builder", "worker", "scheduler")
_WARM_UP = 40  # longer than a block, so that the first new block's costs are over


class Spent:
    """Seconds by part, ours alone: each of our methods counts as +, the method of vLLM's that it calls as -."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, part: str, ours: type, name: str) -> None:
        """Time `ours.name` and the method of that name that comes next in the order of resolution."""
        owners = [c for c in ours.__mro__ if name in vars(c)]
        mine = [c for c in owners if c.__module__.startswith("vllm_defensive")]
        stock = next(c for c in owners if not c.__module__.startswith("vllm_defensive"))
        self._time(part, mine[0], name, 1)
        self._time(part, stock, name, -1)

    def _time(self, part: str, owner: type, name: str, sign: int) -> None:
        method, seconds = vars(owner)[name], self.seconds

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[part] += sign * (time.thread_time() - start)

        setattr(owner, name, timed)


def overhead(model: Path, evicted: Sequence[int], steps: int, repeats: int) -> dict[str, Any]:
    """Median microseconds of each part a step, and the share of all parts in the step, for each number of rows."""
    engine = make_engine_of(model)
    worker, core = worker_of(engine), engine.llm_engine.engine_core.engine_core
    group = worker.model_runner.attn_groups[0][0]
    spent = Spent()
    spent.watch("builder", type(group.metadata_builders[0]), "build")
    spent.watch("worker", type(worker), "execute_model")
    spent.watch("worker", type(worker), "sample_tokens")
    for name in ("schedule", "update_from_output", "make_stats"):
        spent.watch("scheduler", type(core.scheduler), name)
    rounds: dict[int, list[dict[str, float]]] = {rows: [] for rows in evicted}
    for repeat in range(repeats):
        for rows in evicted:
            rounds[rows].append(_measure(engine, spent, rows, steps, f"{repeat}-{rows}"))
        print(f"  round {repeat + 1} of {repeats}", flush=True)
    return {
        "batch": BATCH,
        "steps": steps,
        "repeats": repeats,
        "rows": {
            str(rows): {key: statistics.median(r[key] for r in of_rows) for key in of_rows[0]}
            for rows, of_rows in rounds.items()
        },
    }


def make_engine_of(model: Path) -> Any:
    """An engine that evicts prompts of `LONG` tokens."""
    settings = vllm_defensive.engine_kwargs("snapkv", keep=0.3, min_tokens=LONG)
    return make_engine(model, **settings, max_num_seqs=BATCH)


def _measure(engine: Any, spent: Spent, rows: int, steps: int, name: str) -> dict[str, float]:
    """Decode a full batch of which `rows` requests were evicted; means over `steps` steps, microseconds."""
    from vllm import SamplingParams

    llm = engine.llm_engine
    engine.reset_prefix_cache()
    for i in range(BATCH):
        length = LONG if i < rows else LONG - 1
        tokens = [2 + (i * 131 + j * 17) % 500 for j in range(length)]
        llm.add_request(
            f"{name}-{i}",
            {"prompt_token_ids": tokens},
            SamplingParams(temperature=0, max_tokens=steps + 2 * _WARM_UP + BATCH, ignore_eos=True),
        )
    first: set[str] = set()
    while len(first) < BATCH:
        first.update(output.request_id for output in llm.step() if output.outputs[0].token_ids)
    for _ in range(_WARM_UP):
        llm.step()
    evicted = len(worker_of(engine)._runtime.tables)
    assert evicted == rows, f"{evicted} rows were evicted, not {rows}"
    spent.seconds.clear()
    start = time.thread_time()
    for _ in range(steps):
        llm.step()
    total = time.thread_time() - start
    parts = {part: 1e6 * spent.seconds[part] / steps for part in PARTS}
    llm.abort_request([f"{name}-{i}" for i in range(BATCH)], internal=False)
    while llm.has_unfinished_requests():
        llm.step()
    return {**parts, "step": 1e6 * total / steps, "share": sum(parts.values()) / (1e6 * total / steps)}

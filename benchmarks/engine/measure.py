"""One row: an engine in this process, its single requests and its loads."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.engine.report import STOCK
from benchmarks.server import commit

ALONE, DECODED = 3, 96  # single requests, and tokens of each
_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# What a CUDA graph is made of: nothing; decode batches, without torch.compile; all that vLLM makes by default.
GRAPHS: dict[str, dict[str, Any]] = {
    "none": {"enforce_eager": True},
    "decode": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "full": {},
}


class Engine:
    """An `LLM` that is stepped by hand, so that steps can be timed and looked at."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        import torch
        from vllm import LLM

        import vllm_defensive

        self.block = options.block or (16 if torch.cuda.is_available() else 32)
        blocks = int(options.pool * -(-(options.prompt + options.output) // self.block)) + 1
        evicting = options.row != STOCK
        own = {"keep": options.keep, "per_request": True, "policies": options.policies}
        extra = vllm_defensive.engine_kwargs(options.row, **own) if evicting else {}
        started = time.perf_counter()
        llm = LLM(
            str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", block_size=self.block,
            num_gpu_blocks_override=blocks, max_model_len=options.prompt + options.output + 64,
            max_num_batched_tokens=options.chunk, max_num_seqs=128, disable_log_stats=False,
            **GRAPHS[options.graphs], **extra,
        )  # fmt: skip
        self.start_seconds = time.perf_counter() - started
        self.pool_tokens = (blocks - 1) * self.block
        self._llm, self._engine = llm, llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        self._names = 0
        executor = self._engine.model_executor.driver_worker
        self._evictor = getattr(getattr(executor, "worker", executor), "_evictor", None)
        self.eviction_bytes = 0
        """Most that the evictions of one step have allocated, beside what was there when they began."""
        if self._evictor is not None:
            self._watch_memory()

    def _watch_memory(self) -> None:
        import torch

        run = self._evictor.run

        def watched(scores: Any, evictions: Any) -> None:
            if not evictions or not torch.cuda.is_available():
                return run(scores, evictions)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.profiler.record_function("eviction"):
                run(scores, evictions)
            self.eviction_bytes = max(self.eviction_bytes, torch.cuda.max_memory_allocated() - before)

        self._evictor.run = watched

    def add(self, tokens: int, output: int, seed: int, policy: str | None = None) -> None:
        """Queue a request. policy: its own, on an engine that evicts."""
        from vllm import SamplingParams

        draw = random.Random(seed)
        prompt = [draw.randrange(self._vocabulary // 100 + 3, self._vocabulary) for _ in range(tokens)]
        extra = None if policy is None else {"kv_eviction": policy}
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False, extra_args=extra)
        self._names += 1
        self._engine.add_request(f"r{self._names}", {"prompt_token_ids": prompt}, params)

    def run(self) -> list[tuple[float, int, int, float]]:
        """Step until all requests are answered. (seconds since the start, tokens that came, requests that run, share of
        the pool in use) of each step."""
        samples, seen, started = [], defaultdict(int), time.perf_counter()
        while self._engine.has_unfinished_requests():
            fresh = 0
            for output in self._engine.step():
                count = len(output.outputs[0].token_ids)
                fresh += count - seen[output.request_id]
                seen[output.request_id] = count
            usage = self._scheduler.kv_cache_manager.usage
            samples.append((time.perf_counter() - started, fresh, len(self._scheduler.running), usage))
        return samples

    def eviction_seconds(self) -> float:
        """So far, by the device's clock; those that the device has reported."""
        metrics = [m for m in self._llm.get_metrics() if m.name == "vllm:kv_eviction_seconds"]
        return float(sum(m.sum for m in metrics))


def alone(engine: Engine, tokens: int, seed: int, policy: str | None) -> dict[str, Any]:
    """Medians over single requests: prefill, a decode step, the eviction."""
    prefill, steps, evictions = [], [], []
    for i in range(ALONE + 1):
        before = engine.eviction_seconds()
        engine.add(tokens, DECODED, seed + i, policy)
        times = [t for t, fresh, _, _ in engine.run() if fresh]
        if i:  # the first compiles
            prefill.append(times[0])
            steps.append(statistics.median(b - a for a, b in pairwise(times[8:])))
            evictions.append(engine.eviction_seconds() - before)
    median = statistics.median
    return {
        "tokens": tokens, "ttft_ms": median(prefill) * 1e3, "step_ms": median(steps) * 1e3,
        "eviction_ms": median(evictions) * 1e3, "ttfts_ms": [x * 1e3 for x in prefill],
    }  # fmt: skip


def profile(engine: Engine, tokens: int, seed: int, policy: str | None) -> str:
    """Where the device's time goes in one request of 34 tokens: a table of kernels, the longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        engine.add(tokens, 34, seed, policy)
        engine.run()
    return kernel_table(watched.key_averages())


def kernel_table(averages: Sequence[Any]) -> str:
    """The kernels among torch's averages: not what the host does, nor a named range, which has kernels inside."""
    from torch.autograd import DeviceType

    kernels = [k for k in averages if k.device_type != DeviceType.CPU and not k.is_user_annotation]
    kernels.sort(key=lambda kernel: -kernel.self_device_time_total)
    lines = ["   ms  calls  us a call  kernel"]
    for kernel in kernels[:40]:
        spent = kernel.self_device_time_total
        lines.append(f"{spent / 1e3:6.2f} {kernel.count:6d} {spent / kernel.count:10.1f}  {kernel.key[:90]}")
    return "\n".join(lines) + "\n"


def load(engine: Engine, requests: int, tokens: int, output: int, seed: int) -> dict[str, Any]:
    """So many requests at once, of `tokens` prompt tokens and `output` new ones each."""
    spent, preempted = engine.eviction_seconds(), _preemptions(engine)
    for i in range(requests):
        engine.add(tokens, output, seed * 1000 + i)
    samples = engine.run()
    seconds, answered = samples[-1][0], sum(fresh for _, fresh, _, _ in samples)
    assert answered == requests * output, "a request was not answered whole"
    steps: dict[int, list[float]] = defaultdict(list)
    for (start, before, among, _), (end, fresh, running, _) in pairwise(samples):
        if before == fresh == running == among:  # a decode step in which nobody came or went
            steps[running].append(end - start)
    thin = samples[:: max(1, len(samples) // 200)]
    return {
        "seconds": seconds,
        "output_throughput": answered / seconds,
        "peak_running": max(running for _, _, running, _ in samples),
        "mean_running": sum(n for _, _, n, _ in samples) / len(samples),
        "peak_pool": max(usage for *_, usage in samples),
        "preemptions": _preemptions(engine) - preempted,
        "eviction_seconds": engine.eviction_seconds() - spent,
        "step_ms_by_running": {n: statistics.median(t) * 1e3 for n, t in sorted(steps.items()) if len(t) >= 5},
        "samples": [(round(t, 3), running, round(usage, 3)) for t, _, running, usage in thin],
    }


def _preemptions(engine: Engine) -> float:
    return float(sum(m.value for m in engine._llm.get_metrics() if m.name == "vllm:num_preemptions"))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row's record, as it grows: with single requests, and with each load."""
    with model_folder(options.model) as folder:
        engine = Engine(options, folder)
    names = ("row", "keep", "prompt", "output", "requests", "pool", "graphs", "chunk")
    record: dict[str, Any] = {
        **{name: getattr(options, name) for name in names},
        "model": "Llama-3.1-8B's shape" if options.model is None else options.model.name,
        "block": engine.block,
        "pool_tokens": engine.pool_tokens,
        "start_seconds": engine.start_seconds,
        "machine": machine(),
        "command": f"python -m benchmarks.engine {' '.join(sys.argv[1:-2])}",  # without this process's --row NAME
    }
    print(f"{options.row}: ready after {engine.start_seconds:.0f} s", flush=True)
    kept = int(options.prompt * options.keep)
    wanted = {"stock": (options.prompt, None), "stock, kept length": (kept, None)}
    if options.row != STOCK:
        wanted = {name: (options.prompt, name) for name in ("none", *options.policies.split(","))}
    record["alone"], profiles = {}, ""
    for number, (name, (tokens, policy)) in enumerate(wanted.items()):
        engine.eviction_bytes = 0
        record["alone"][name] = alone(engine, tokens, 100 * number + 7, policy)
        record["alone"][name]["eviction_mib"] = engine.eviction_bytes / 2**20
        if options.profile:
            profiles += f"{name}, {tokens} tokens\n{profile(engine, tokens, 100 * number + 50, policy)}\n"
        print(f"  alone, {name}: {_short(record['alone'][name])}", flush=True)
    if options.profile:
        (options.out / f"profile-{options.row}.txt").write_text(profiles)
    record["loads"] = []
    yield record
    load(engine, 4, options.prompt, 16, 1)  # warms up
    record["prefill"] = load(engine, options.requests, options.prompt, 2, 2)
    print(f"  answers of 2: {_short(record['prefill'])}", flush=True)
    for repeat in range(options.repeats):
        record["loads"].append(load(engine, options.requests, options.prompt, options.output, 3 + repeat))
        print(f"  load {repeat}: {_short(record['loads'][-1])}", flush=True)
        yield record


def _short(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, int | float))


def machine() -> dict[str, str]:
    import torch
    import triton
    import vllm

    from benchmarks.kernels.machine import driver

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "driver": driver() if gpu else "-",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
        "python": sys.version.split()[0],
        "commit": commit(),
    }


@contextmanager
def model_folder(chosen: Path | None) -> Iterator[Path]:
    """The chosen model's, or one with the default model's config, which is all that random weights need."""
    if chosen is not None:
        yield chosen
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_LLAMA_8B))
        yield Path(folder)

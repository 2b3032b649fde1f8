"""Stock vLLM and vLLM with eviction on an 8B model's shape, for machines with a GPU: `python -m benchmarks.engine`.

Weights are random, so any GPU that holds them will do, and nothing is downloaded. Each row is an engine in a process of
its own, started once: first single requests, for what an eviction costs a prefill and gains a decode step; then many at
once on a pool that holds a few. `benchmarks.serving` measures more, over vLLM's own load generator, and starts an
engine for every round; this one is for an hour, or minutes, on a borrowed GPU.

Appends to OUT/records.jsonl, after each part of a row, so that what was measured stays if the machine goes; and writes
OUT/report.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.server import commit
from vllm_defensive.policy import PRESETS

RESULTS = Path("benchmarks/results/engine")
STOCK = "stock"
_ABOUT = """\
Random weights, all requests at once, medians. Beyond prefill: ratio of the time that is left when that of the same load
with answers of two tokens is taken off. Alone: one request at a time."""
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


def parse(arguments: list[str]) -> argparse.Namespace:
    about = f"{(__doc__ or '').split(chr(10) * 2)[0]} The defaults are for a GPU with some 40 GB."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=about)
    parser.add_argument("--model", type=Path, help="folder with a config.json (default: Llama-3.1-8B's shape)")
    parser.add_argument("--rows", default="stock,halokv", help="stock, or a policy; comma-separated")
    parser.add_argument("--policies", default="halokv,layer-defensivekv", help="of single requests")
    parser.add_argument("--keep", type=float, default=0.2, help="of each prompt's cache")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens")
    parser.add_argument("--output", type=int, default=1024, help="tokens")
    parser.add_argument("--requests", type=int, default=24, help="of a load, all at once")
    parser.add_argument("--pool", type=float, default=4, help="KV cache in multiples of one request")
    parser.add_argument("--repeats", type=int, default=1, help="loads; each has prompts of its own")
    parser.add_argument(
        "--graphs", choices=GRAPHS, default="decode", help="CUDA graphs: none; of decode steps; all, and torch.compile"
    )
    parser.add_argument("--block", type=int, help="tokens of a block (default: 16, on CPUs 32)")
    parser.add_argument("--chunk", type=int, default=8192, help="vLLM's max_num_batched_tokens")
    parser.add_argument("--profile", action="store_true", help="also write what single requests spend their time on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of records and report")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # this process measures it
    options = parser.parse_args(arguments)
    policies = {name for name, policy in PRESETS.items() if not policy.internal}
    for option, names, known in (
        ("--rows", options.rows, {STOCK, *policies}),
        ("--policies", options.policies, {"none", *policies}),
    ):
        if unknown := set(names.split(",")) - known:
            parser.error(f"{option} {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}")
    return options


# -- one row, in its own process --------------------------------------------------------------------------------------


class Engine:
    """An `LLM` that is stepped by hand, so that steps can be timed and looked at."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        import torch
        from vllm import LLM

        import vllm_defensive

        self.block = options.block or (16 if torch.cuda.is_available() else 32)
        blocks = int(options.pool * -(-(options.prompt + options.output) // self.block)) + 1
        evicting = options.row != STOCK
        extra = vllm_defensive.engine_kwargs(options.row, keep=options.keep, per_request=True) if evicting else {}
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

        evict = self._evictor.evict

        def watched(evictions: Any) -> None:
            if not evictions or not torch.cuda.is_available():
                return evict(evictions)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.profiler.record_function("eviction"):
                evict(evictions)
            self.eviction_bytes = max(self.eviction_bytes, torch.cuda.max_memory_allocated() - before)

        self._evictor.evict = watched

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
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        engine.add(tokens, 34, seed, policy)
        engine.run()
    kernels = [k for k in watched.key_averages() if k.device_type != DeviceType.CPU and not k.is_user_annotation]
    kernels.sort(key=lambda kernel: -kernel.self_device_time_total)
    lines = ["   ms  calls  us a call  kernel"]
    for kernel in kernels[:40]:
        spent = kernel.self_device_time_total
        lines.append(f"{spent / 1e3:6.2f} {kernel.count:6d} {spent / kernel.count:10.1f}  {kernel.key[:90]}")
    return "\n".join(lines) + "\n"


def load(engine: Engine, options: argparse.Namespace, output: int, seed: int) -> dict[str, Any]:
    """All requests at once."""
    spent, preempted = engine.eviction_seconds(), _preemptions(engine)
    for i in range(options.requests):
        engine.add(options.prompt, output, seed * 1000 + i)
    samples = engine.run()
    seconds, tokens = samples[-1][0], sum(fresh for _, fresh, _, _ in samples)
    assert tokens == options.requests * output, "a request was not answered whole"
    steps: dict[int, list[float]] = defaultdict(list)
    for (start, before, among, _), (end, fresh, running, _) in pairwise(samples):
        if before == fresh == running == among:  # a decode step in which nobody came or went
            steps[running].append(end - start)
    thin = samples[:: max(1, len(samples) // 200)]
    return {
        "seconds": seconds,
        "output_throughput": tokens / seconds,
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
        names = ["none", *options.policies.split(",")]
        wanted = {name: (options.prompt, name) for name in names}
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
    load(engine, argparse.Namespace(**{**vars(options), "requests": 4}), 16, 1)  # warms up
    record["prefill"] = load(engine, options, 2, 2)
    print(f"  answers of 2: {_short(record['prefill'])}", flush=True)
    for repeat in range(options.repeats):
        record["loads"].append(load(engine, options, options.output, 3 + repeat))
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


# -- the report -------------------------------------------------------------------------------------------------------


def report(records: list[dict[str, Any]]) -> str:
    """Markdown, a table for each load on each machine. Rows that were measured again count once, the last time."""
    lines = ["# Engines", "", _ABOUT]
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        of = ("model", "prompt", "output", "requests", "pool", "graphs", "chunk", "block", "machine")
        groups[json.dumps([record[name] for name in of])][_name(record)] = record
    for rows in groups.values():
        group = list(rows.values())
        load = "{model}: {requests} x ({prompt} + {output}) tokens, a pool of {pool:g}, graphs: {graphs}"
        lines += ["", f"## {load.format(**group[0])}", ""]
        lines += [", ".join(f"{name} {value}" for name, value in group[0]["machine"].items()), ""]
        lines += ["| row | output tok/s | to stock | beyond prefill | peak running | evictions, s | preemptions |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        loaded = [record for record in group if record["loads"]]
        stock = next((_rates(record) for record in loaded if record["row"] == STOCK), None)
        for record in loaded:
            rate, seconds = _rates(record)
            ratios = ["-", "-"] if stock is None else [f"{rate / stock[0]:.2f}", f"{stock[1] / seconds:.2f}"]
            peak = max(one["peak_running"] for one in record["loads"])
            spent = statistics.median(one["eviction_seconds"] for one in record["loads"])
            thrown = sum(one["preemptions"] for one in record["loads"])
            cells = [_name(record), f"{rate:.0f}", *ratios, f"{peak}", f"{spent:.2f}", f"{thrown:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| alone | TTFT, ms | eviction, ms | of the TTFT | its memory, MiB | decode step, ms |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for record in group:
            for name, one in record["alone"].items():
                share = one["eviction_ms"] / one["ttft_ms"]
                cells = [f"{_name(record)}: {name}, {one['tokens']} tokens", f"{one['ttft_ms']:.1f}"]
                memory = f"{one['eviction_mib']:.0f}" if one.get("eviction_mib") else "-"
                cells += [f"{one['eviction_ms']:.2f}", f"{share:.1%}", memory, f"{one['step_ms']:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _name(record: dict[str, Any]) -> str:
    return STOCK if record["row"] == STOCK else f"{record['row']} {record['keep']:g}"


def _rates(record: dict[str, Any]) -> tuple[float, float]:
    """Median output throughput, and median seconds beyond those of the same load with answers of two tokens."""
    beyond = [one["seconds"] - record["prefill"]["seconds"] for one in record["loads"]]
    return statistics.median(one["output_throughput"] for one in record["loads"]), statistics.median(beyond)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "records.jsonl"
    if options.row:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler is looked at
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        before = file.read_text() if file.exists() else ""
        for record in measure(options):
            file.write_text(f"{before}{json.dumps(record)}\n")
        return 0
    failed = 0
    for row in options.rows.split(","):
        failed |= subprocess.run([sys.executable, "-m", "benchmarks.engine", *arguments, "--row", row]).returncode
    if file.exists():
        text = report([json.loads(line) for line in file.read_text().splitlines()])
        (options.out / "report.md").write_text(text)
        print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

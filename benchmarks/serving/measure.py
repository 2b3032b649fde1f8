"""One load on one server, with what `/metrics` says meanwhile, or on an engine of its own, with what its log says."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import Server
from benchmarks.serving.dummies import model_folder
from benchmarks.serving.scenarios import BLOCK_SIZE, Row, Scenario

# What is taken over from the result of `vllm bench serve`.
_KEPT = (
    "duration", "completed", "request_throughput", "output_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms", "total_input_tokens",
    "total_output_tokens",
)  # fmt: skip
_COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "evicted": "vllm:kv_eviction_requests_total",
    "freed_blocks": "vllm:kv_eviction_freed_blocks_total",
    "eviction_seconds": "vllm:kv_eviction_seconds_sum",
    "adoptions": "vllm:kv_eviction_adoptions_total",
    "published": "vllm:kv_eviction_published_total",
    "lost": "vllm:kv_eviction_published_lost_total",
    "echo_tokens": "vllm:kv_eviction_echo_tokens_total",
    "cached_tokens": "vllm:prompt_tokens_cached_total",
}
_SHORTEST = 2  # tokens; prompts of which one is asked are not evicted


class Watch(threading.Thread):
    """Samples running requests and the pool's occupancy until it is told to stop."""

    def __init__(self, server: Server, seconds: float = 0.5) -> None:
        super().__init__(daemon=True)
        self._server, self._seconds, self._over = server, seconds, threading.Event()
        self.samples: list[tuple[float, float, float]] = []
        """(seconds since the start, requests that run, share of the pool in use)"""

    def run(self) -> None:
        started = time.monotonic()
        while not self._over.wait(self._seconds):
            try:
                values = _values(self._server, "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
            except OSError:
                continue  # a busy machine may answer too late; the peak is then taken over the other samples
            self.samples.append((round(time.monotonic() - started, 2), values[0], round(values[1], 4)))

    def stop(self) -> list[tuple[float, float, float]]:
        self._over.set()
        self.join()
        return self.samples


class Servers:
    """The servers of a scenario's rows; the next scenario gets the same ones if it asks for the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._up: list[tuple[int, Server]] = []  # by the place of their row
        self._wanted: list[tuple[str, list[str]]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, scenario: Scenario) -> list[tuple[Row, Server]]:
        """Those of its rows that start; RuntimeError if one does not that is not optional."""
        wanted = [
            (scenario.model, ["--served-model-name", "model", *scenario.engine_args(row)]) for row in scenario.rows
        ]
        if wanted != self._wanted:
            self._stack.close()
            self._up, self._wanted = [], []  # should one of them fail to start
            for i, (model, args) in enumerate(wanted):
                server = Server(model_folder(model), args, self._folder / "logs" / f"{i}.log")
                try:
                    self._up.append((i, self._stack.enter_context(server)))
                except RuntimeError as error:
                    if not scenario.rows[i].optional:
                        raise
                    print(f"{scenario.name}: left out {scenario.rows[i].name}: {error}", flush=True)
            self._wanted = wanted
        return [(scenario.rows[i], server) for i, server in self._up]


def compare(
    servers: Servers, scenario: Scenario, rounds: Sequence[int], folder: Path, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Records of all rows of a scenario in the given rounds, as they come. Round i's prompts have seed + i + 1.

    The servers are up together and take turns, so that a change of the machine's speed hits each of them; an idle one
    waits without computing. A few requests warm up; then a round with the shortest answers of evicted prompts tells how
    much of the others is prefill, unless texts come again.
    """
    if scenario.offline:
        yield from _compare_offline(scenario, rounds, folder, seed)
        return
    up = servers.of(scenario)
    few = scenario.of_few()
    for row, server in up:
        _load(few, row, server, seed, folder, scenario.output)
    # Of texts that come again no server computes the same share.
    prefill = [
        None if scenario.rounds else _load(scenario, row, server, seed, folder, output=_SHORTEST)["duration"]
        for row, server in up
    ]
    for repeat in rounds:
        for (row, server), seconds in zip(up, prefill, strict=True):
            record = _load(scenario, row, server, seed + repeat + 1, folder, scenario.output)
            yield {**record, "repeat": repeat, "prefill_seconds": seconds}


def _load(scenario: Scenario, row: Row, server: Server, seed: int, folder: Path, output: int) -> dict[str, Any]:
    result = folder / "logs" / "bench.json"
    before = _counters(server)
    watch = Watch(server)
    watch.start()
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai",
        "--base-url", server.url, "--endpoint", "/v1/completions", "--model", "model",
        "--tokenizer", str(model_folder(scenario.model)),
        "--seed", str(seed), "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name,
        "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99", "--disable-tqdm",
        *scenario.load_args(folder / "logs" / "prompts.jsonl", seed, output),
    ]  # fmt: skip
    if scenario.rounds:
        # No check with a prompt that would then be known.
        command += ["--save-detailed", "--ready-check-timeout-sec", "0"]
    if body := scenario.extra_body(row):
        command += ["--extra-body", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    samples = watch.stop()
    if done.returncode != 0:
        raise RuntimeError(
            f"vllm bench serve ended with {done.returncode}:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        )
    measured = json.loads(result.read_text())
    if measured["completed"] != scenario.requests:
        raise RuntimeError(f"{scenario.name}, {row.name}: only {measured['completed']} requests were answered")
    wanted = scenario.requests * scenario.prompt
    if scenario.documents is not None and measured["total_input_tokens"] != wanted:
        read = measured["total_input_tokens"]
        raise RuntimeError(f"{scenario.name}: prompts have {read} tokens instead of {wanted}: a word is not a token")
    after = _counters(server)
    counted = {name: after[name] - before[name] for name in _COUNTERS}
    return {
        **_about(scenario, row),
        **{name: measured[name] for name in _KEPT},
        **counted,
        **(_rounds(scenario, measured, counted["cached_tokens"]) if scenario.rounds else {}),
        **_peaks(samples),
    }


def _rounds(scenario: Scenario, measured: dict[str, Any], cached_tokens: float) -> dict[str, Any]:
    """The first round beside the later ones. A round ends once so many requests are answered as it has: the next one's
    first have begun by then, as no server is kept waiting between them."""
    first = scenario.requests // scenario.rounds
    ttfts, begun = measured["ttfts"], measured["start_times"]
    ended = sorted(start + ttft + sum(gaps) for start, ttft, gaps in zip(begun, ttfts, measured["itls"], strict=True))
    turn = ended[first - 1]
    asked = measured["total_input_tokens"] if scenario.asked_tokens is None else scenario.asked_tokens
    of_rounds = {"": ttfts, "first_": ttfts[:first], "later_": ttfts[first:]}
    return {
        "rounds": scenario.rounds,
        "first_requests": first,
        "first_throughput": first / (turn - min(begun)),
        "later_throughput": (len(ended) - first) / (ended[-1] - turn) if len(ended) > first else None,
        **{
            f"{name}median_ttft_ms": 1000 * statistics.median(some) if some else None
            for name, some in of_rounds.items()
        },
        **{f"{name}p90_ttft_ms": 1000 * _p90(some) if some else None for name, some in of_rounds.items()},
        "asked_tokens": asked,
        "computed_tokens": asked - cached_tokens,
    }


def _p90(values: Sequence[float]) -> float:
    """The least value that nine of ten do not exceed."""
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]


def _compare_offline(scenario: Scenario, rounds: Sequence[int], folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """`compare` with `vllm bench throughput`: engines come and go instead of taking turns."""
    prefill = [_run_offline(scenario, row, seed, folder, output=_SHORTEST)["duration"] for row in scenario.rows]
    for repeat in rounds:
        for row, seconds in zip(scenario.rows, prefill, strict=True):
            record = _run_offline(scenario, row, seed + repeat + 1, folder, scenario.output)
            yield {**record, "repeat": repeat, "prefill_seconds": seconds}


# A line of vLLM's statistics. Preemptions are not in it: vLLM 0.32 sets their count to 0 just before it looks at it.
_STATISTICS = re.compile(r"Running: (\d+) reqs.*?KV cache usage: ([\d.]+)%")


def _run_offline(scenario: Scenario, row: Row, seed: int, folder: Path, output: int) -> dict[str, Any]:
    result, log = folder / "logs" / "offline.json", folder / "logs" / "offline.log"
    result.parent.mkdir(parents=True, exist_ok=True)
    model = str(model_folder(scenario.model))
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "throughput",
        "--model", model, "--tokenizer", model, "--seed", str(seed), "--output-json", str(result),
        "--num-warmups", "1", "--prequeue-requests",
        "--disable-detokenize", *scenario.load_args(folder, seed, output), *scenario.engine_args(row),
    ]  # fmt: skip
    environment = {
        **os.environ,
        # One process, whose engine has all cores: with a process for each part, as vLLM has them by default, the one
        # that waits for the worker spins on the core that the worker needs.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "VLLM_LOG_STATS_INTERVAL": "0.5",
    }
    with log.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=out, env=environment, timeout=3600)
    text = log.read_text(errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"vllm bench throughput ended with {done.returncode}:\n{text[-3000:]}")
    seconds = json.loads(result.read_text())["elapsed_time"]
    lines = _STATISTICS.findall(text[text.rfind(f"| 0/{scenario.requests} [") :])
    if not lines:
        raise RuntimeError(f"vllm bench throughput logged no statistics:\n{text[-3000:]}")
    # At equal distances, which is nearly so: a line waits for the end of a step.
    samples = [(round(seconds * i / len(lines), 2), float(n), float(used) / 100) for i, (n, used) in enumerate(lines)]
    return {
        **_about(scenario, row),
        "duration": seconds,
        "request_throughput": scenario.requests / seconds,
        "output_throughput": scenario.requests * output / seconds,
        "total_output_tokens": scenario.requests * output,
        **_peaks(samples),
    }


def _about(scenario: Scenario, row: Row) -> dict[str, Any]:
    return {
        "scenario": scenario.name,
        "row": row.name,
        "model": scenario.model,
        "prompt": scenario.prompt,
        "output": scenario.output,
        "requests": scenario.requests,
        "offered": scenario.offered,
        "shares": bool(scenario.shared or scenario.turns or scenario.documents),
        "pool": scenario.pool,
        "pool_tokens": (scenario.pool_blocks - 1) * BLOCK_SIZE,
    }


def _peaks(samples: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    return {
        "peak_running": max((s[1] for s in samples), default=0),
        "peak_pool": max((s[2] for s in samples), default=0),
        "samples": samples,
    }


def _counters(server: Server) -> dict[str, float]:
    """Totals so far; what a server without eviction does not count is zero."""
    return dict(zip(_COUNTERS, _values(server, *_COUNTERS.values()), strict=True))


def _values(server: Server, *names: str) -> list[float]:
    """Metrics' values by one look at `/metrics`, summed over their labels; 0 for one that is not there."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples if sample.name in names]
    return [sum(sample.value for sample in samples if sample.name == name) for name in names]

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
import subprocess
import sys
from pathlib import Path

from benchmarks.engine.measure import GRAPHS, measure
from benchmarks.engine.report import STOCK, report
from vllm_defensive.policy import PRESETS

RESULTS = Path("benchmarks/results/engine")


def parse(arguments: list[str]) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")[0]
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

"""Costs of a step besides the model: `python -m benchmarks.steps simulate|overhead|growth`; see docs/performance.md.

Each part prints its figures and writes them to benchmarks/results/steps/, where `growth` also draws its plots.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks.latency import ENVIRONMENT

RESULTS = Path(__file__).resolve().parent.parent / "results" / "steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("simulate", help="scheduler steps without a model, beside stock vLLM's")
    part.add_argument("--steps", type=int, default=10_000)
    part.add_argument("--repeats", type=int, default=3)
    part.add_argument("--asynchronous", action="store_true", help="compare the asynchronous schedulers")
    part.add_argument("--queue", type=int, default=0, help="this many requests wait for memory all the time")
    part.add_argument("--packings", type=int, default=0, help="this many packings of other documents are held")
    part = parts.add_parser("overhead", help="our Python in a decode step, by number of evicted rows")
    part.add_argument("--evicted", type=int, nargs="+", default=[0, 1, 16, 64])
    part.add_argument("--steps", type=int, default=100)
    part.add_argument("--repeats", type=int, default=3)
    part = parts.add_parser("growth", help="eviction time against prompt length and number of evictions")
    part.add_argument("--policies", nargs="+", default=["snapkv", "adakv", "layer-defensivekv"])
    part.add_argument("--tokens", type=int, nargs="+", default=[1024 * i for i in range(1, 9)])
    part.add_argument("--evictions", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    part.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    name = arguments.part
    with tempfile.TemporaryDirectory() as scratch:
        if name == "simulate":
            from benchmarks.steps.simulate import simulate
            from benchmarks.tiny_model import write_tiny_llama

            model = write_tiny_llama(Path(scratch))
            queue, packings = arguments.queue, arguments.packings
            result = simulate(model, arguments.steps, arguments.repeats, arguments.asynchronous, queue, packings)
            name += f"_queue_{queue}" * bool(queue) + f"_packings_{packings}" * bool(packings)
            name += "_async" * arguments.asynchronous
        elif name == "overhead":
            from benchmarks.steps.overhead import overhead
            from benchmarks.tiny_model import write_tiny_llama

            model = write_tiny_llama(Path(scratch), max_positions=8192)
            result = overhead(model, arguments.evicted, arguments.steps, arguments.repeats)
        else:
            from benchmarks.models import ensure_model
            from benchmarks.steps.growth import draw, growth

            result = growth(
                ensure_model(), arguments.policies, arguments.tokens, arguments.evictions, arguments.repeats
            )
            arguments.out.mkdir(parents=True, exist_ok=True)
            draw(result, arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

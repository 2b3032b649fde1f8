"""What pages of fewer bits cost, beside 16-bit pages of the same bytes: `python -m benchmarks.widths`.

One engine, in which each case's prompts have widths of their own; the cases take turns. An eviction's time and a decode
step's, in processor time of the one thread, as ratios to those of 16 bits. Of `none` too: nothing evicted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import vllm_defensive
from benchmarks import lists
from benchmarks.latency import ENVIRONMENT, Case, make_engine, run_once
from benchmarks.models import ensure_model


def cases_of(engine: object, tokens: int, policy: str, keep: float, widths: list[str]) -> list[Case]:
    whole = Case("none", tokens, engine, {"kv_eviction": "none"})
    settings = {"kv_eviction": policy, "kv_eviction_keep": keep}
    return [whole, *(Case(name, tokens, engine, {**settings, "kv_eviction_widths": name}) for name in widths)]


def measure(cases: list[Case], batch: int, repeats: int) -> dict[str, dict[str, float]]:
    """By case: milliseconds of an eviction and of a decode step, and both over those of 16 bits. The first round warms
    up."""
    for seed in range(repeats + 1):
        for case in cases:
            run_once(case, batch, seed)
            if seed == 0:
                case.decode.clear(), case.eviction.clear()
        print(f"  batch {batch}: round {seed} of {repeats}", flush=True)
    times = {
        case.name: {
            "eviction_ms": 1000 * statistics.median(case.eviction) / batch,
            "decode_ms": 1000 * statistics.median(case.decode),
        }
        for case in cases
    }
    for each in times.values():
        for part in ("eviction", "decode"):
            each[f"{part}_vs_16"] = each[f"{part}_ms"] / times["16"][f"{part}_ms"]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.widths", description=__doc__)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct, made if it is missing")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--batch", type=lists.ints, default=[1, 8])
    parser.add_argument("--policy", default="halokv")
    parser.add_argument("--widths", nargs="+", default=["16", "k8v4", "8", "4", "8,4"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file as well")
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    engine = make_engine(arguments.model or ensure_model(), **vllm_defensive.engine_kwargs("none", per_request=True))
    widths = list(dict.fromkeys(("16", *arguments.widths)))
    rows = []
    for batch in arguments.batch:
        cases = cases_of(engine, arguments.tokens, arguments.policy, arguments.keep, widths)
        rows.append({"batch": batch, "cases": measure(cases, batch, arguments.repeats)})
        print(json.dumps(rows[-1], indent=1), flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) for k, v in vars(arguments).items() if k != "out"}
        arguments.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

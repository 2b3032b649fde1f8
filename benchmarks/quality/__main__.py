"""`python -m benchmarks.quality --policies a,b --keep 0.5,0.2 --contexts 1024,2048 --samples 10,5 --out DIR`

May be stopped at any time and started again with the same folder, or with more policies, ratios, contexts or samples:
only what is missing is measured. `--report` alone writes the tables and plots of what is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.quality import plan, records, texts

RESULTS = Path(__file__).resolve().parent.parent / "results" / "quality"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct, made if it is missing")
    add(
        "--policies",
        type=_names,
        default=None,
        help="default: all that users can choose; also NAME@OPTION=VALUE+OPTION=VALUE, and fp8 (stock vLLM, fp8 cache)",
    )
    add("--keep", type=_floats, default=[0.5, 0.2, 0.1], help="nominal ratios; default: 0.5,0.2,0.1")
    add("--contexts", type=_ints, default=[1024, 2048, 4096], help="prompt sizes in tokens; default: 1024,2048,4096")
    add("--samples", type=_ints, default=[10, 10, 3], help="documents for each context; one number holds for all")
    add("--suites", type=_names, default=list(plan.SUITES), help=f"default: {','.join(plan.SUITES)}")
    add("--tasks", type=_names, default=[], help="limit forced and ruler to these; default: all")
    add("--protocols", type=_names, default=[plan.WINDOW, plan.AFTER], help="default: window,after")
    add("--seed", type=int, default=0, help="of the first document; default: 0")
    add("--dtype", default="bfloat16", help="default: %(default)s")
    add("--page-tokens", type=int, default=32, help="tokens a page; default: %(default)s")
    add("--cache-gib", type=int, default=2, help="memory of the KV cache; default: %(default)s")
    add("--out", type=Path, default=RESULTS, help="folder of the records; default: %(default)s")
    add("--report", action="store_true", help="measure nothing, only write the report")
    chosen = parser.parse_args(arguments)
    if len(chosen.samples) == 1:
        chosen.samples *= len(chosen.contexts)
    if len(chosen.samples) != len(chosen.contexts):
        parser.error(f"--samples: give one number, or {len(chosen.contexts)}, one for each context")
    for suite in chosen.suites:
        if suite not in plan.SUITES:
            parser.error(f"--suites {suite}: choose from {', '.join(plan.SUITES)}")
    return chosen


def main() -> None:
    chosen = parse()
    store = records.Records(chosen.out)
    if not chosen.report:
        measure(chosen, store)
    from benchmarks.quality import report

    print(report.write(store.rows, chosen.out))


def measure(chosen: argparse.Namespace, store: records.Records) -> None:
    """Run every item that lacks results, with a progress bar."""
    from tqdm import tqdm

    from benchmarks.models import ensure_model
    from benchmarks.quality.engine import FP8, Engine

    engine = Engine(
        chosen.model or ensure_model(), dtype=chosen.dtype, page_tokens=chosen.page_tokens, cache_gib=chosen.cache_gib
    )
    from benchmarks.quality import variants
    from benchmarks.quality.protocols import Runner
    from vllm_defensive.policy import public_names

    policies = [name if name == FP8 else variants.resolve(name) for name in chosen.policies or public_names()]
    fp8_engine = None
    if FP8 in policies:
        fp8_engine = Engine(
            chosen.model or ensure_model(),
            dtype="bfloat16",
            page_tokens=chosen.page_tokens,
            cache_gib=chosen.cache_gib,
            stock=True,
            kv_cache_dtype="fp8",
        )
    runner, started = Runner(engine, fp8_engine), time.perf_counter()
    todo = []
    for item in plan.items(chosen.suites, chosen.contexts, chosen.samples, chosen.seed, chosen.tasks):
        choices = records.choices_for(item, policies, chosen.keep, chosen.protocols)
        if missing := store.missing(item, choices):
            todo.append((item, missing))
    seconds: dict[str, list[float]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run that is told to stop is logged as well
    try:
        for item, missing in tqdm(todo, unit="item", disable=None):
            began = time.perf_counter()
            store.add(runner.run(item, missing))
            each = (time.perf_counter() - began) / len(missing)
            seconds.setdefault(f"{item.suite}/{item.context}", []).append(each)
    finally:
        _log_run(chosen, seconds, time.perf_counter() - started, engine)


def _log_run(chosen: argparse.Namespace, seconds: dict[str, list[float]], total: float, engine: Any) -> None:
    """One line per run: its command, what it ran on, its wall time, seconds per item and setting."""
    import torch
    import vllm

    run = {
        "command": "python -m benchmarks.quality " + " ".join(sys.argv[1:]),
        "seconds": round(total, 1),
        "seconds_per_item_and_setting": {k: round(sum(v) / len(v), 3) for k, v in sorted(seconds.items())},
        "counters": engine.totals(),
        "dtype": chosen.dtype,
        "page_tokens": chosen.page_tokens,
        "text": f"{texts.SOURCE}, {texts.fingerprint()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
    }
    with (chosen.out / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()

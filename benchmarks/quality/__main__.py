"""`python -m benchmarks.quality --policies a,b --keep 0.5,0.2 --contexts 1024,2048 --samples 10,5 --out DIR`

May be stopped at any time and started again with the same folder, or with more policies, ratios, contexts or samples:
only what is missing is measured. `--report` alone writes the tables and plots of what is there.

`--contract A B` measures two policies and all their crosses, and says which of their differences makes the difference.
`--data DIR` measures documents of others, LongBench-E and KV retrieval, from files.
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

from tqdm import tqdm

from benchmarks import lists
from benchmarks.models import ensure_model
from benchmarks.quality import contract, plan, records, report, texts, variants
from benchmarks.quality.engine import FP8, Engine
from benchmarks.quality.files import FILES, Files
from benchmarks.quality.prompts import Prompts
from benchmarks.quality.protocols import Runner

RESULTS = Path(__file__).resolve().parent.parent / "results" / "quality"
CONTRACT_RESULTS = RESULTS.with_name("quality-contract")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct, made if it is missing")
    what = parser.add_mutually_exclusive_group().add_argument
    what(
        "--policies",
        type=lists.names,
        help="default: all that users can choose; also NAME@OPTION=VALUE+OPTION=VALUE, and fp8 (stock vLLM, fp8 cache)",
    )
    what("--contract", nargs=2, metavar=("A", "B"), help="two policies to take apart: all crosses of them are measured")
    add("--keep", type=lists.floats, default=[0.5, 0.2, 0.1], help="nominal ratios; default: 0.5,0.2,0.1")
    add(
        "--contexts",
        type=lists.ints,
        default=[1024, 2048, 4096],
        help="prompt sizes in tokens; default: 1024,2048,4096",
    )
    add("--samples", type=lists.ints, default=[10, 10, 3], help="documents for each context; one number holds for all")
    add("--data", type=Path, metavar="DIR", help=f"a folder with {' and '.join(FILES.values())}, plain, .gz or .xz")
    add(
        "--suites",
        type=lists.names,
        help=f"default: {','.join(plan.SUITES)}; with --data: {','.join(plan.FILE_SUITES)}; with --contract: "
        f"{','.join(plan.CONTRACT_SUITES)}",
    )
    add("--tasks", type=lists.names, default=[], help="limit suites of several tasks to these; default: all")
    add("--protocols", type=lists.names, default=[plan.WINDOW, plan.AFTER], help="default: window,after; also parts")
    add("--seed", type=int, default=0, help="of the first document; default: 0")
    add("--dtype", default="bfloat16", help="default: %(default)s")
    add("--page-tokens", type=int, default=32, help="tokens a page; default: %(default)s")
    add("--cache-gib", type=int, default=2, help="memory of the KV cache; default: %(default)s")
    add("--learned", metavar="FILE", help="learned score; default: the model's own, where one is found")
    add("--out", type=Path, help=f"folder of the records; default: {RESULTS}; with --contract: {CONTRACT_RESULTS}")
    add("--report", action="store_true", help="measure nothing, only write the report")
    chosen = parser.parse_args(arguments)
    if len(chosen.samples) == 1:
        chosen.samples *= len(chosen.contexts)
    if len(chosen.samples) != len(chosen.contexts):
        parser.error(f"--samples: give one number, or {len(chosen.contexts)}, one for each context")
    for protocol in chosen.protocols:
        if protocol not in plan.PROTOCOLS:
            parser.error(f"--protocols {protocol}: choose from {', '.join(plan.PROTOCOLS)}")
    chosen.out = chosen.out or (CONTRACT_RESULTS if chosen.contract else RESULTS)
    usual = plan.FILE_SUITES if chosen.data else plan.CONTRACT_SUITES if chosen.contract else plan.SUITES
    chosen.suites = chosen.suites or list(usual)
    known = plan.SUITES + (plan.FILE_SUITES if chosen.data else ())
    for suite in chosen.suites:
        if suite not in known:
            remedy = ", and give --data" if suite in plan.FILE_SUITES else ""
            parser.error(f"--suites {suite}: choose from {', '.join(known)}{remedy}")
    return chosen


def main() -> None:
    chosen = parse()
    store = records.Records(chosen.out)
    if not chosen.contract:
        if not chosen.report:
            measure(chosen, store, chosen.policies)
        print(report.write(store.rows, chosen.out))
        return
    terms = contract.draw_up(*chosen.contract)
    if not chosen.report:
        measure(chosen, store, list(terms.crosses.values()))
    print(contract.write(store.rows, terms, chosen.out))


def measure(chosen: argparse.Namespace, store: records.Records, names: list[str] | None) -> None:
    """Run every item that lacks results of the policies `names`, with a progress bar. None: all that are offered."""
    engine = _engine(chosen)
    policies = [name if name == FP8 else variants.resolve(name) for name in names or _offered(chosen)]
    fp8_engine = _engine(chosen, dtype="bfloat16", stock=True, kv_cache_dtype=FP8) if FP8 in policies else None
    files = Files(chosen.data, Prompts(engine.tokenizer)) if chosen.data else None
    for reason in files.missing if files else ():
        print(f"left out, {reason}", file=sys.stderr)
    runner, started = Runner(engine, fp8_engine, files), time.perf_counter()
    todo = []
    for item in plan.items(chosen.suites, chosen.contexts, chosen.samples, chosen.seed, chosen.tasks, files):
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


def _offered(chosen: argparse.Namespace) -> list[str]:
    return variants.offered(chosen.model or ensure_model(), chosen.learned)


def _engine(chosen: argparse.Namespace, **other: Any) -> Engine:
    shape = {"dtype": chosen.dtype, "page_tokens": chosen.page_tokens, "cache_gib": chosen.cache_gib}
    shape["learned"] = chosen.learned
    return Engine(chosen.model or ensure_model(), **{**shape, **other})


def _log_run(chosen: argparse.Namespace, seconds: dict[str, list[float]], total: float, engine: Engine) -> None:
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


if __name__ == "__main__":
    main()

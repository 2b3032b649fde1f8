"""`python -m benchmarks.serving --preset pressure`: the servers of each scenario take turns under `vllm bench serve`.

Resumable: rounds whose records are there are not measured again. `--report` alone writes tables and plots.

The preset `documents` asks questions about documents that come again, more of them than the pool holds; `chats` has
chats whose turns do. Rows are servers there as well: stock vLLM with its prefix cache, and those of `--rows`.
In the preset `answers` requests are evicted again and again while they generate.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks import lists
from benchmarks.serving import report
from benchmarks.serving.dummies import MODELS
from benchmarks.serving.measure import Servers, compare
from benchmarks.serving.scenarios import DOCUMENT_ROWS, ORDERS, PRESETS, Sizes, scenarios

RESULTS = Path(__file__).parent.parent / "results" / "serving"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--preset", default="pressure", help=f"one or more of {', '.join(PRESETS)}; comma-separated")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts that warm up; each round has the next one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of records and report")
    parser.add_argument("--report", action="store_true", help="measure nothing, only write the report")
    _add_sizes(parser)
    args = parser.parse_args()
    try:
        given: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(Sizes)}
        sizes = Sizes(**{**given, **{name: tuple(v) for name, v in given.items() if isinstance(v, list)}})
        wanted = [scenario for preset in args.preset.split(",") for scenario in scenarios(preset, sizes)]
    except ValueError as error:
        parser.error(str(error))
    # A terminated benchmark (by `timeout`, say) must leave through its `with`, or its servers stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # One thread for the engine: on two cores the server and the load generator then stay out of each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "records.jsonl"
    if not args.report:
        with (args.out / "commands.txt").open("a") as commands:
            seed = f" --seed {args.seed}" if args.seed else ""
            own = _flags(sizes)
            commands.write(f"python -m benchmarks.serving --preset {args.preset} --repeats {args.repeats}{seed}{own}\n")
        with Servers(args.out) as servers:
            for scenario in wanted:
                done = {(r["scenario"], r["row"], r["repeat"]) for r in report.read(file)}
                rows = [row.name for row in scenario.rows if not row.optional]
                rounds = [i for i in range(args.repeats) if not {(scenario.name, row, i) for row in rows} <= done]
                if not rounds:
                    continue
                print(f"{scenario.name}: {', '.join(row.name for row in scenario.rows)}", flush=True)
                for record in compare(servers, scenario, rounds, args.out, args.seed):
                    with file.open("a") as out:
                        out.write(json.dumps(record) + "\n")
                report.write(args.out)
    print(report.write(args.out))


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """The fields of `Sizes`."""
    default = Sizes()
    group = parser.add_argument_group(
        "presets documents, chats and answers; sizes are those of documents, the last five those of answers"
    )

    def add(flag: str, text: str, **how: Any) -> None:
        value = getattr(default, flag.removeprefix("--").replace("-", "_"))
        said = f"; default {_said(value)}" if value else ""
        group.add_argument(flag, default=value, help=text + said, **how)

    rows = "; ".join(f"{name}: {text}" for name, text in DOCUMENT_ROWS.items())
    add("--model", f"one of {', '.join(MODELS)}")
    add("--policy", "of the rows that evict")
    add("--documents", "so many", type=int)
    add("--document-tokens", "of each", type=int)
    add("--question-tokens", "of each", type=int)
    add("--answer-tokens", "of each", type=int)
    add("--rounds", "questions, in multiples of the documents", type=int)
    add("--concurrency", "requests at once", type=int)
    add("--pools", "documents that each holds, beside what runs; default a quarter of all, and all", type=lists.ints)
    add("--orders", f"in which documents are asked about, of {', '.join(ORDERS)}", type=lists.names)
    add("--rows", f"beside stock vLLM, of {rows}. A pool of all documents has stock and reuse only", type=lists.names)
    add("--requests", "so many", type=int)
    add("--generated-tokens", "of each request", type=int)
    add("--pool-tokens", "that the pool holds", type=int)
    add("--budget", "tokens a head that a request keeps", type=int)
    add("--interval", "tokens that it generates between two evictions", type=int)


def _flags(sizes: Sizes) -> str:
    """What of them is not the default, as it is given."""
    told = ""
    for field in fields(Sizes):
        value = getattr(sizes, field.name)
        if value != getattr(Sizes(), field.name):
            told += f" --{field.name.replace('_', '-')} {shlex.quote(_said(value))}"
    return told


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    main()

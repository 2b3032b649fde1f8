"""`python -m benchmarks.serving --preset pressure`: the servers of each scenario take turns under `vllm bench serve`.

Resumable: rounds whose records are there are not measured again. `--report` alone writes tables and plots.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from benchmarks.serving import report
from benchmarks.serving.measure import Servers, compare
from benchmarks.serving.scenarios import PRESETS, scenarios

RESULTS = Path(__file__).parent.parent / "results" / "serving"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--preset", default="pressure", help=f"one or more of {', '.join(PRESETS)}; comma-separated")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts that warm up; each round has the next one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of records and report")
    parser.add_argument("--report", action="store_true", help="measure nothing, only write the report")
    args = parser.parse_args()
    try:
        wanted = [scenario for preset in args.preset.split(",") for scenario in scenarios(preset)]
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
            commands.write(f"python -m benchmarks.serving --preset {args.preset} --repeats {args.repeats}{seed}\n")
        with Servers(args.out) as servers:
            for scenario in wanted:
                done = {(r["scenario"], r["row"], r["repeat"]) for r in report.read(file)}
                rows = [row.name for row in scenario.rows]
                rounds = [i for i in range(args.repeats) if not {(scenario.name, row, i) for row in rows} <= done]
                if not rounds:
                    continue
                print(f"{scenario.name}: {', '.join(rows)}", flush=True)
                for record in compare(servers, scenario, rounds, args.out, args.seed):
                    with file.open("a") as out:
                        out.write(json.dumps(record) + "\n")
                report.write(args.out)
    print(report.write(args.out))


if __name__ == "__main__":
    main()

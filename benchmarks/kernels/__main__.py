"""`python -m benchmarks.kernels [--tokens 8192,32768] [--rows 1,8,64] [--keep 0.2] [--out DIR] [--smoke]`

Needs a CUDA GPU. --smoke runs tiny sizes in Triton's interpreter on the CPU, to show that everything still works; its
times mean nothing. Writes kernels.json and kernels.md into --out (by default benchmarks/results).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import lists

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kernels.cases import Case

RESULTS = Path("benchmarks/results")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--tokens", type=lists.ints, default=[8192, 32768, 131072], help="prompt lengths")
    parser.add_argument("--rows", type=lists.ints, default=[1, 8, 64], help="batch sizes of the decode step")
    parser.add_argument("--keep", type=float, default=0.2, help="fraction of the cache that is kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes in the interpreter, on the CPU")
    return parser.parse_args(arguments)


def groups(options: argparse.Namespace) -> Iterator[tuple[str, Iterator[Case]]]:
    """(name, cases) of measurements that share inputs; the inputs are made when the first case is asked for."""
    from benchmarks.kernels.cases import LLAMA_8B, TINY, decode_case, eviction_cases
    from benchmarks.kernels.echo import echo_cases
    from benchmarks.kernels.learned import learned_cases

    def decode(rows: int, tokens: int) -> Iterator[Case]:
        yield decode_case(shape, rows, tokens, options.keep)

    shape = TINY if options.smoke else LLAMA_8B
    for tokens in [160] if options.smoke else options.tokens:
        yield f"eviction of {tokens} tokens", eviction_cases(shape, tokens, options.keep)
        yield f"learned scores of {tokens} tokens", learned_cases(shape, tokens)
        yield f"echoes of {tokens} tokens", echo_cases(shape, tokens)
        for rows in [2] if options.smoke else options.rows:
            yield f"decode of {rows} x {tokens} tokens", decode(rows, tokens)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not options.smoke and not torch.cuda.is_available():
        print("benchmarks.kernels: no CUDA GPU here; --smoke runs tiny sizes in Triton's interpreter", file=sys.stderr)
        return 2
    from benchmarks.kernels.machine import Limits, Machine
    from benchmarks.kernels.report import Report, Row, measure

    torch.manual_seed(0)
    device = "cpu" if options.smoke else "cuda"
    report = Report(Machine.here(device), None if options.smoke else Limits.measure(), options.smoke)

    def add(row: Row) -> None:
        report.rows.append(row)
        print(row.line(report.limits), flush=True)
        report.write(options.out)  # after each: what is measured stays, whatever comes next

    for name, group in groups(options):
        try:
            for case in group:
                add(measure(case, device))
        except (RuntimeError, AssertionError) as error:  # inputs that do not fit the memory: the next may
            add(Row(name, "-", 0, 0, failure=f"no inputs: {type(error).__name__}: {error}".split("\n")[0][:200]))
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"{options.out}/kernels.md")
    return 1 if any(row.failure for row in report.rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
